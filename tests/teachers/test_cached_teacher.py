"""A cache written by a real teacher, read by CachedTeacher: what objectives see, refusals, resuming."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from kdlib.data.collate import DistillationCollator
from kdlib.data.positions import causal_positions
from kdlib.data.rows import prepare_dataset
from kdlib.kernels import linear_objective
from kdlib.objectives import ForwardKL, GeneralizedJSD, ReverseKL, SkewKL, TotalVariation
from kdlib.objectives.base import RowObjective
from kdlib.objectives.cross.likelihoods import teacher_likelihoods
from kdlib.teachers.cache import CachedTeacher
from kdlib.teachers.hf import HFTeacher
from kdlib.teachers.vllm import VLLMTeacher
from kdlib.teachers.write_cache import write_cache
from kdlib.types import Head, Positions, StudentSignal, Support, TeacherSignal
from tests.serving.fake import FakeServer
from tests.teachers.test_vllm_teacher import Engine
from tests.tiny import CHATML_TEMPLATE, tiny_llama, tiny_tokenizer

V = len(tiny_tokenizer())
PADDED = V + 16  # entries of the models' heads
TEXTS = [f"{'two plus ' * (1 + 5 * i % 7)}{i} is four, because the sky is blue." for i in range(22)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def teacher() -> HFTeacher:
    return HFTeacher(tiny_llama(PADDED, seed=1))


@pytest.fixture(scope="module")
def dataset(tokenizer: PreTrainedTokenizerBase) -> Dataset:
    return prepare_dataset(Dataset.from_dict({"text": TEXTS}), tokenizer, max_length=64).dataset


def cached(
    directory: Path, teacher: Any, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> CachedTeacher:
    settings = {"k": V, "batch_size": 3, "rows_per_shard": 6, "teacher_name": "tiny"} | options
    write_cache(teacher, dataset, directory=directory, tokenizer=tokenizer, **settings)
    return CachedTeacher(directory, tokenizer=tokenizer)


def batch_of(dataset: Dataset, rows: list[int]) -> tuple[dict[str, Any], Positions]:
    batch = DistillationCollator(pad_token_id=0)(dataset.select(rows).to_list())
    return batch, causal_positions(batch)


def dense(teacher: HFTeacher, batch: Mapping[str, Any], positions: Positions) -> TeacherSignal:
    return teacher.signal(batch, positions).sliced(V)


def student(positions: Positions) -> StudentSignal:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(len(positions), 16, generator=generator)
    weight = torch.randn(V, 16, generator=generator) / 4
    return StudentSignal(hidden=hidden, head=Head(weight=weight), positions=positions)


def per_row(signal: TeacherSignal, positions: Positions, objective: RowObjective) -> float:
    loss = linear_objective(student(positions), signal, objective)
    return float(loss.sum) / loss.count


OBJECTIVES = [ForwardKL(), ReverseKL(), GeneralizedJSD(beta=0.3), SkewKL(alpha=0.1), TotalVariation()]


@pytest.mark.parametrize(("bits", "tolerance"), [(16, 1e-3), (8, 2e-2)])
def test_with_k_of_the_whole_vocabulary_objectives_equal_the_dense_ones(
    tmp_path: Path,
    teacher: HFTeacher,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    bits: int,
    tolerance: float,
) -> None:
    ours = cached(tmp_path, teacher, dataset, tokenizer, bits=bits)
    batch, positions = batch_of(dataset, [4, 0, 20, 9])
    signal = ours.signal(batch, positions)
    assert signal.support is Support.TOPK is ours.provides
    for objective in OBJECTIVES:
        expected = per_row(dense(teacher, batch, positions), positions, objective)
        assert per_row(signal, positions, objective) == pytest.approx(expected, abs=tolerance)
        assert expected > 0.05


def test_truncation_is_a_lower_bound_that_rises_with_k(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    batch, positions = batch_of(dataset, list(range(8)))
    losses = []
    for k in (1, 8, 64, V):
        ours = cached(tmp_path / str(k), teacher, dataset, tokenizer, k=k)
        losses.append(per_row(ours.signal(batch, positions), positions, ForwardKL()))
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(per_row(dense(teacher, batch, positions), positions, ForwardKL()), abs=1e-3)


def test_a_signal_holds_the_teachers_top_k(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    ours = cached(tmp_path, teacher, dataset, tokenizer, k=8, temperature=2.0)
    batch, positions = batch_of(dataset, [7, 3])
    signal = ours.signal(batch, positions)
    expected = dense(teacher, batch, positions).at(slice(None), 2.0).logp.topk(8)
    assert signal.ids is not None and signal.ids.dtype == torch.int64
    assert torch.equal(signal.ids, expected.indices)
    seen = signal.at(slice(None), 2.0)
    assert torch.allclose(seen.logp, expected.values, atol=3e-3)
    assert torch.allclose(seen.rest.exp(), 1 - expected.values.exp().sum(-1), atol=1e-3)
    with pytest.raises(ValueError, match=r"captured at temperature 2\.0"):
        signal.at(slice(None), 1.0)


def test_order_packing_and_duplicates_do_not_matter(
    tmp_path: Path, teacher: HFTeacher, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = Dataset.from_dict({"text": [*TEXTS, TEXTS[5], TEXTS[5]]})
    plain = prepare_dataset(rows, tokenizer, max_length=64).dataset
    packed = prepare_dataset(rows, tokenizer, max_length=128, packing=True).dataset
    assert max(len(row["sample_id"]) for row in packed) > 1
    from_plain = cached(tmp_path / "plain", teacher, plain, tokenizer, k=8)
    from_packed = cached(tmp_path / "packed", teacher, packed, tokenizer, k=8)
    for source, chosen in ((plain, [23, 5, 1, 22, 0]), (packed, [2, 0, 1])):
        batch, positions = batch_of(source, chosen)
        expected = dense(teacher, batch, positions).at(slice(None), 1.0).logp.topk(8)
        for ours in (from_plain, from_packed):
            signal = ours.signal(batch, positions)
            assert torch.equal(signal.ids, expected.indices)  # type: ignore[arg-type]
            assert torch.allclose(signal.logp.float(), expected.values, atol=6e-3)  # type: ignore[union-attr]


def test_positions_of_several_sequences_may_be_interleaved(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    ours = cached(tmp_path, teacher, dataset, tokenizer, k=8)
    batch, positions = batch_of(dataset, [2, 11])
    column = positions.index % batch["labels"].shape[1]
    order = torch.argsort(column, stable=True)
    mixed = replace(
        positions,
        index=positions.index[order],
        labels=positions.labels[order],
        sequence=positions.sequence[order],
    )
    assert torch.equal(ours.signal(batch, mixed).ids, ours.signal(batch, positions).ids[order])  # type: ignore[arg-type, index]


def test_sampled_draws_follow_the_teacher_and_depend_on_the_seed_and_the_sample_alone(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = cached(tmp_path / "a", teacher, dataset, tokenizer, kind="sampled", k=50, seed=7)
    again = cached(
        tmp_path / "b",
        teacher,
        dataset.select(range(21, -1, -1)),
        tokenizer,
        kind="sampled",
        k=50,
        seed=7,
        batch_size=5,
    )
    other = cached(tmp_path / "c", teacher, dataset, tokenizer, kind="sampled", k=50, seed=8)
    assert first.provides is Support.SAMPLED_TEACHER
    batch, positions = batch_of(dataset, list(range(12)))
    signal = first.signal(batch, positions)
    assert signal.rest is None and signal.ids is not None and signal.logp is not None
    assert torch.equal(signal.ids, again.signal(batch, positions).ids)  # type: ignore[arg-type]
    assert not torch.equal(signal.ids, other.signal(batch, positions).ids)  # type: ignore[arg-type]
    logp = dense(teacher, batch, positions).at(slice(None), 1.0).logp
    assert torch.allclose(signal.logp.float(), logp.gather(-1, signal.ids), atol=6e-3)
    entropy = -(logp.exp() * logp).sum(-1).mean()
    spread = ((logp.exp() * logp**2).sum(-1) - (logp.exp() * logp).sum(-1) ** 2).sum().div(50).sqrt() / len(logp)
    assert abs(-signal.logp.float().mean() - entropy) < 4 * spread + 1e-3
    exact = per_row(dense(teacher, batch, positions), positions, ForwardKL())
    assert per_row(signal, positions, ForwardKL()) == pytest.approx(exact, rel=0.1)


def of_labels(signal: TeacherSignal, positions: Positions, *, temperature: float = 1.0) -> torch.Tensor:
    return signal.at(slice(None), temperature).logp.gather(-1, positions.labels[:, None])


@pytest.mark.parametrize(("bits", "tolerance"), [(32, 1e-5), (16, 6e-3), (8, 6e-2)])
def test_given_keeps_the_log_probs_of_the_rows_own_tokens(
    tmp_path: Path, teacher: HFTeacher, tokenizer: PreTrainedTokenizerBase, bits: int, tolerance: float
) -> None:
    rows = Dataset.from_dict({"text": TEXTS})
    plain = prepare_dataset(rows, tokenizer, max_length=64).dataset
    packed = prepare_dataset(rows, tokenizer, max_length=128, packing=True).dataset
    ours = cached(tmp_path, teacher, packed, tokenizer, kind="given", bits=bits)  # k stays 1
    assert ours.provides is Support.SAMPLED_STUDENT and ours.reader.meta.k == 1 and ours.reader.meta.seed is None
    for source, chosen in ((plain, [19, 5, 1, 21, 0]), (packed, [2, 0, 1])):
        batch, positions = batch_of(source, chosen)
        signal, wanted = ours.signal(batch, positions), of_labels(dense(teacher, batch, positions), positions)
        assert signal.support is Support.SAMPLED_STUDENT and signal.rest is None and signal.ids is not None
        assert torch.equal(signal.ids, positions.labels[:, None])
        torch.testing.assert_close(signal.at(slice(None), 1.0).logp, wanted, rtol=0, atol=tolerance)
        torch.testing.assert_close(teacher_likelihoods(signal, positions.labels), wanted[:, 0], rtol=0, atol=tolerance)


def test_given_at_a_temperature(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    ours = cached(tmp_path, teacher, dataset, tokenizer, kind="given", temperature=2.0, bits=32)
    batch, positions = batch_of(dataset, [3, 1])
    wanted = of_labels(dense(teacher, batch, positions), positions, temperature=2.0)
    torch.testing.assert_close(ours.signal(batch, positions).at(slice(None), 2.0).logp, wanted, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cannot be re-tempered"):
        ours.signal(batch, positions).at(slice(None), 1.0)


def no_answer(listed: list[Any]) -> list[Any]:
    return [None] * len(listed)


def test_given_tokens_of_a_server(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, dataset: Dataset) -> None:
    model, root = tiny_llama(V, seed=5), tmp_path / "model"
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    engine = Engine(model, hidden=False)
    with FakeServer(engine, root=str(root)) as server:
        served = VLLMTeacher(server.url, signal="sampled")
        own = cached(tmp_path / "own", HFTeacher(model), dataset, tokenizer, kind="given", bits=32)
        ours = cached(tmp_path / "served", served, dataset, tokenizer, kind="given", bits=32)
        batch, positions = batch_of(dataset, [8, 2, 17])
        ids = ours.signal(batch, positions).ids
        assert ids is not None and torch.equal(ids[:, 0], positions.labels)
        logp = [x.signal(batch, positions).logp for x in (ours, own)]
        torch.testing.assert_close(*logp, rtol=0, atol=1e-5)
        for teacher, options, message in (
            (served, {"kind": "topk"}, "kind topk needs whole distributions"),
            (served, {"kind": "sampled"}, "kind sampled needs whole distributions"),
            (served, {"kind": "given", "temperature": 2.0}, "at temperature 1.0, 2.0 is asked for"),
            (VLLMTeacher(server.url, signal="topk", k=V), {"kind": "given"}, "use a model, or a server with signal sampled"),
            (ours, {"kind": "given"}, "kind given needs whole distributions"),
        ):
            with pytest.raises(ValueError, match=message):
                cached(tmp_path / "refused", teacher, dataset, tokenizer, **options)


@pytest.mark.parametrize("signal", ["sampled", "hidden"])
def test_given_leaves_out_rows_without_an_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, signal: Any
) -> None:
    model, root = tiny_llama(V, seed=5), tmp_path / "model"
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    rows = [{**row, "input_ids": [100 + i, *row["input_ids"][1:]]} for i, row in enumerate(dataset.select(range(6)).to_list())]
    spoil: Any = no_answer if signal == "sampled" else lambda states: states * torch.nan
    with FakeServer(Engine(model, hidden=signal == "hidden", spoil={101: spoil}), root=str(root)) as server:
        served = VLLMTeacher(server.url, signal=signal)
        short = cached(tmp_path / "short", served, Dataset.from_list(rows), tokenizer, kind="given", bits=32, batch_size=6)
    assert short.reader.index.summary["sequences"] == 5
    batch, positions = batch_of(Dataset.from_list(rows), [0, 2, 3, 4, 5])
    found, wanted = short.signal(batch, positions), of_labels(dense(HFTeacher(model), batch, positions), positions)
    assert found.ids is not None and torch.equal(found.ids[:, 0], positions.labels)
    torch.testing.assert_close(found.logp, wanted, rtol=0, atol=1e-5)


class Interrupted(HFTeacher):
    """Stops after some batches, as Ctrl-C does."""

    batches_left = 5

    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        if self.batches_left == 0:
            raise KeyboardInterrupt
        self.batches_left -= 1
        return super().signal(batch, positions, layers)


def test_interrupted_and_continued_gives_the_same_bytes_and_a_finished_one_asks_no_teacher(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    cached(tmp_path / "whole", teacher, dataset, tokenizer, k=8)
    stopping = Interrupted(teacher.model)
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "stopped", stopping, dataset, tokenizer, k=8)
    with pytest.raises(ValueError, match=r"unfinished \(12 of 22 rows\)"):
        CachedTeacher(tmp_path / "stopped")
    cached(tmp_path / "stopped", teacher, dataset, tokenizer, k=8)
    whole, stopped = ({f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in ("whole", "stopped"))
    assert whole == stopped and len(whole) == 5
    cached(tmp_path / "stopped", stopping, dataset, tokenizer, k=8)


def test_another_dataset_or_setting_does_not_continue_a_cache(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    cached(tmp_path, teacher, dataset, tokenizer, k=8)
    with pytest.raises(ValueError, match=r"\(k: 8 -> 9\)"):
        cached(tmp_path, teacher, dataset, tokenizer, k=9)
    with pytest.raises(ValueError, match=r"\(dataset: \w+ -> \w+\)"):
        cached(tmp_path, teacher, dataset.select(range(21, -1, -1)), tokenizer, k=8)


def test_another_tokenizer_or_template_is_refused(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    ours = cached(tmp_path, teacher, dataset, tokenizer, k=8)
    with pytest.raises(ValueError, match="another tokenizer"):
        CachedTeacher(tmp_path, tokenizer=tiny_tokenizer(vocab_size=V - 20))
    with pytest.raises(ValueError, match="another chat template"):
        ours.check(tiny_tokenizer(chat_template=CHATML_TEMPLATE))
    with pytest.raises(ValueError, match="another chat template, chat_template_kwargs or tools"):
        ours.check(tokenizer, chat_template_kwargs={"enable_thinking": False})


def test_batches_the_cache_cannot_serve_are_refused_in_one_line(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    ours = cached(tmp_path, teacher, dataset.select(range(6)), tokenizer, k=8)
    batch, positions = batch_of(dataset, [1, 8])
    with pytest.raises(ValueError, match=r"\A1 of 2 samples .*kdlib cache.*max_length.*\Z"):
        ours.signal(batch, positions)
    batch, positions = batch_of(dataset, [1, 2])
    fewer = replace(positions, index=positions.index[1:], labels=positions.labels[1:], sequence=positions.sequence[1:])
    with pytest.raises(ValueError, match=r"\Asample \d+ has \d+ scored positions in the batch and \d+ in .*\Z"):
        ours.signal(batch, fewer)
    with pytest.raises(ValueError, match="no hidden layers"):
        ours.signal(batch, positions, (1,))


def test_a_cache_cannot_be_written_from_a_cache(
    tmp_path: Path, teacher: HFTeacher, dataset: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    ours = cached(tmp_path / "a", teacher, dataset, tokenizer, k=8)
    with pytest.raises(ValueError, match="whole distributions"):
        cached(tmp_path / "b", ours, dataset, tokenizer, k=8)

"""Every row is answered by the teacher it names, in the order of the positions, packed or not."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from kdlib.data import causal_positions, prepare_dataset
from kdlib.objectives import ForwardKL, GeneralizedJSD
from kdlib.serving import BadRowsError
from kdlib.teachers import CachedTeacher, EnsembleTeacher, HFTeacher, RoutedTeacher
from kdlib.teachers.composed import RoutedSignal
from kdlib.teachers.write_cache import write_cache
from kdlib.types import Head, Support, TeacherSignal
from tests.teachers.fakes import ROWS, Fixed, Lookup, collated, graded
from tests.tiny import tiny_llama, tiny_tokenizer

CHUNKED = import_module("kdlib.kernels.chunked")
V = 32
NAMED = [{**row, "teacher": name} for row, name in zip(ROWS, ("b", "a", "b", "c"), strict=True)]
PACKED = [
    {
        "input_ids": [*ROWS[0]["input_ids"], *ROWS[1]["input_ids"]],
        "labels": [*ROWS[0]["labels"], *ROWS[1]["labels"]],
        "seq_lengths": [5, 3],
        "sample_id": [11, 12],
        "teacher": ["b", "a"],
    },
    {**ROWS[3], "seq_lengths": [6], "sample_id": [14], "teacher": ["c"]},
    {
        "input_ids": [*ROWS[2]["input_ids"], *ROWS[1]["input_ids"]],
        "labels": [*ROWS[2]["labels"], *ROWS[1]["labels"]],
        "seq_lengths": [4, 3],
        "sample_id": [13, 12],
        "teacher": ["a", "b"],
    },
]


def models() -> dict[str, Any]:
    """Different widths, so that neither hidden states nor heads can be put into one tensor."""
    sizes = {"a": 16, "b": 32, "c": 48}
    return {name: tiny_llama(V, hidden=hidden, seed=hidden).double() for name, hidden in sizes.items()}


def alone(model: Any, row: dict[str, Any]) -> Tensor:
    """log-probs at the scored positions of one row, by the model's own forward pass."""
    logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    return logits[[i - 1 for i, label in enumerate(row["labels"]) if label != -100 and i > 0]]


def test_each_row_has_the_answer_of_its_own_model() -> None:
    teachers = models()
    batch, where = collated(NAMED, pad_to_multiple_of=8)
    signal = RoutedTeacher({name: HFTeacher(model) for name, model in teachers.items()}).signal(batch, where)
    wanted = torch.cat([alone(teachers[row["teacher"]], row) for row in NAMED])
    assert (len(signal), signal.vocab_size, signal.support) == (len(where), V, Support.FULL)
    torch.testing.assert_close(signal.at(slice(None), 1.0).logp, wanted)
    torch.testing.assert_close(signal.at(slice(2, 6), 1.0).logp, wanted[2:6])
    tempered = (wanted[1:] / 2.0).log_softmax(-1)
    torch.testing.assert_close(signal.at(slice(1, None), 2.0).logp, tempered)


@pytest.mark.parametrize("flatten", [False, True])
def test_packed_samples_go_to_their_own_teachers(flatten: bool) -> None:
    teachers = models()
    batch, where = collated(PACKED, flatten=flatten)
    signal = RoutedTeacher({name: HFTeacher(model) for name, model in teachers.items()}).signal(batch, where)
    samples = [(0, "b"), (1, "a"), (3, "c"), (2, "a"), (1, "b")]
    wanted = torch.cat([alone(teachers[name], ROWS[row]) for row, name in samples])
    torch.testing.assert_close(signal.at(slice(None), 1.0).logp, wanted, rtol=1e-5, atol=1e-7)


def test_a_teacher_sees_only_lines_of_its_own() -> None:
    batch, where = collated(NAMED[:2])
    own = {name: Fixed(TeacherSignal(logits=torch.zeros(count, V))) for name, count in (("a", 2), ("b", 3), ("c", 0))}
    RoutedTeacher(own).signal(batch, where)
    assert [len(teacher.seen) for teacher in own.values()] == [1, 1, 0]
    assert own["a"].seen == [[[10, 11, 12, 0, 0]]] and own["b"].seen == [[[5, 6, 7, 8, 9]]]


def test_one_teachers_batch_is_passed_on_as_it_is() -> None:
    batch, where = collated([{**row, "teacher": "a"} for row in ROWS])
    only = Fixed(TeacherSignal(logits=torch.zeros(len(where), V)))
    assert RoutedTeacher({"a": only, "b": only}).signal(batch, where) is only.made


@pytest.mark.parametrize("support", [Support.TOPK, Support.SAMPLED_STUDENT, Support.SAMPLED_TEACHER])
def test_truncated_signals_come_back_in_order(support: Support) -> None:
    tables = {name: torch.randn(V, V, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("abc")}
    batch, where = collated(NAMED)
    teachers = {name: Lookup(table, support=support) for name, table in tables.items()}
    found = RoutedTeacher(teachers).signal(batch, where).at(slice(None), 1.0)
    for i, (index, label) in enumerate(zip(where.index.tolist(), where.labels.tolist(), strict=True)):
        token, name = int(batch["input_ids"].flatten()[index]), NAMED[int(where.sequence[i])]["teacher"]
        logp = tables[name][token].log_softmax(-1)
        ids = logp.topk(3).indices if support is Support.TOPK else torch.tensor([label])
        assert found.ids is not None and torch.equal(found.ids[i], ids)
        torch.testing.assert_close(found.logp[i], logp[ids])
        outside = 1 - logp[ids].exp().sum() if support is Support.TOPK else torch.tensor(0.0)
        torch.testing.assert_close(found.rest[i].exp(), outside, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("objective", [ForwardKL(temperature=2.0), GeneralizedJSD()], ids=["kl", "jsd"])
def test_loss_and_gradient_are_those_of_the_rows_put_together(
    objective: Any, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, n = torch.Generator().manual_seed(2), 200

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    route = torch.randint(0, 3, (n,), generator=generator)
    counts = torch.bincount(route).tolist()
    heads = [Head(weight=random(V, 4)), Head(weight=random(V + 5, 6), softcap=2.0), Head(weight=random(V, 3))]
    parts = [TeacherSignal(hidden=random(c, h.weight.shape[1]), head=h) for c, h in zip(counts, heads, strict=True)]
    dense = torch.empty(n, V, dtype=torch.float64)
    for i, part in enumerate(parts):
        assert part.head is not None and part.hidden is not None
        dense[route == i] = part.head(part.hidden)[:, :V]
    wanted, of_wanted = graded(objective, TeacherSignal(logits=dense), impl=impl, n=n, vocab=V)
    for rows in (256, 9):  # whole, and in chunks whose blocks may hold rows of one teacher only
        monkeypatch.setattr(CHUNKED, "CPU_CHUNK", rows)
        monkeypatch.setattr(CHUNKED, "CPU_BLOCK_BYTES", 2 * V * 8)
        found, of_found = graded(objective, RoutedSignal(members=tuple(parts), route=route), impl=impl, n=n, vocab=V)
        assert found.sum.item() == pytest.approx(wanted.sum.item(), rel=1e-12)
        for gradient, other in zip(of_found, of_wanted, strict=True):
            torch.testing.assert_close(gradient, other)


def test_an_ensemble_may_be_one_of_the_routes() -> None:
    teachers = models()
    hf = {name: HFTeacher(model) for name, model in teachers.items()}
    batch, where = collated(NAMED)
    signal = RoutedTeacher({"a": EnsembleTeacher([hf["a"], hf["c"]]), "b": hf["b"], "c": hf["c"]}).signal(batch, where)
    mixed = (0.5 * alone(teachers["a"], NAMED[1]).exp() + 0.5 * alone(teachers["c"], NAMED[1]).exp()).log()
    torch.testing.assert_close(signal.at(slice(3, 5), 1.0).logp, mixed)
    torch.testing.assert_close(signal.at(slice(0, 3), 1.0).logp, alone(teachers["b"], NAMED[0]))


def test_privileged_rows_are_routed_with_their_own_input() -> None:
    teachers = models()
    rows = [{**row, "teacher_prompt_ids": [21, 22, 23][: i + 1] if i < 3 else None} for i, row in enumerate(NAMED)]
    batch, where = collated(rows)
    signal = RoutedTeacher({name: HFTeacher(model) for name, model in teachers.items()}).signal(batch, where)
    seen = []
    for row in rows:
        start = next(i for i, label in enumerate(row["labels"]) if label != -100)
        prompt = row["input_ids"][:start] if row["teacher_prompt_ids"] is None else row["teacher_prompt_ids"]
        ids, labels = [*prompt, *row["input_ids"][start:]], [-100] * len(prompt) + row["labels"][start:]
        seen.append(alone(teachers[row["teacher"]], {"input_ids": ids, "labels": labels}))
    torch.testing.assert_close(signal.at(slice(None), 1.0).logp, torch.cat(seen))


# Data ---------------------------------------------------------------------------------------------


def rows() -> Dataset:
    return Dataset.from_list([{"text": f"two plus {i} make four", "teacher": "ab"[i % 2]} for i in range(6)])


@pytest.mark.parametrize("packing", [False, True])
def test_prepared_rows_are_checked_before_training(packing: bool) -> None:
    dataset = prepare_dataset(rows(), tiny_tokenizer(), max_length=48, packing=packing).dataset
    teacher = Fixed(TeacherSignal(logits=torch.zeros(1, V)))
    RoutedTeacher({"a": teacher, "b": teacher}).check_rows(dataset, what="training")
    with pytest.raises(ValueError, match=r"names the teacher 'b': its `teacher` must be one of a, math$"):
        RoutedTeacher({"a": teacher, "math": teacher}).check_rows(dataset, what="training")
    with pytest.raises(ValueError, match=r"training rows name no teacher: add a `teacher` column with one of a$"):
        RoutedTeacher({"a": teacher}).check_rows(dataset.remove_columns("teacher"), what="training")


def test_caches_are_asked_for_their_own_rows_only(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    dataset = prepare_dataset(rows(), tokenizer, max_length=48).dataset
    of = {name: HFTeacher(tiny_llama(len(tokenizer), seed=seed)) for name, seed in (("a", 1), ("b", 2))}
    for name, teacher in of.items():
        own = dataset.select([i for i, row in enumerate(dataset) if row["teacher"] == name]).remove_columns("teacher")
        write_cache(teacher, own, directory=tmp_path / name, tokenizer=tokenizer, teacher_name=name, k=5)
    routed = RoutedTeacher({name: CachedTeacher(tmp_path / name) for name in of})
    routed.check_rows(dataset, what="training")
    batch, where = collated(list(dataset))
    found, wanted = (x.signal(batch, where).at(slice(None), 1.0) for x in (routed, RoutedTeacher(of)))
    top = wanted.logp.topk(5)
    assert torch.equal(found.ids, top.indices)  # type: ignore[arg-type]
    torch.testing.assert_close(found.logp, top.values, rtol=0, atol=5e-3)
    with pytest.raises(ValueError, match=r"3 of 3 training a rows are not in the cache"):
        RoutedTeacher(dict.fromkeys("ab", CachedTeacher(tmp_path / "b"))).check_rows(dataset, what="training")


# Refusals -----------------------------------------------------------------------------------------


def test_names_are_checked_in_the_batch_too() -> None:
    teacher = Fixed(TeacherSignal(logits=torch.zeros(10, V)))
    routed = RoutedTeacher({"a": teacher, "b": teacher})
    with pytest.raises(ValueError, match=r"names the teacher 'c': its `teacher` must be one of a, b$"):
        routed.signal(*collated(NAMED))
    with pytest.raises(ValueError, match=r"a row without a teacher: .* one of a, b$"):
        routed.signal(*collated([{**ROWS[0], "teacher": None}]))
    with pytest.raises(ValueError, match=r"the rows name no teacher: .* one of a, b$"):
        routed.signal(*collated(ROWS))
    with pytest.raises(ValueError, match="single teacher"):
        routed.signal(*collated(NAMED), (1,))


def test_signals_that_cannot_be_put_together_are_refused() -> None:
    table = torch.randn(V, V)
    with pytest.raises(ValueError, match=r"same kind of signal, not a: Support.TOPK, b: Support.SAMPLED_STUDENT"):
        RoutedTeacher({"a": Lookup(table), "b": Lookup(table, support=Support.SAMPLED_STUDENT)})
    with pytest.raises(ValueError, match="needs teachers"):
        RoutedTeacher({})
    batch, where = collated(NAMED[:2])
    with pytest.raises(ValueError, match=r"different numbers of ids \(a: 3, b: 4\)"):
        RoutedTeacher({"a": Lookup(table), "b": Lookup(table, k=4)}).signal(batch, where)
    with pytest.raises(ValueError, match=r"different temperatures \(a: 1.0, b: 2.0\)"):
        RoutedTeacher({"a": Lookup(table), "b": Lookup(table, temperature=2.0)}).signal(batch, where)


def test_nothing_scored_gives_an_empty_signal() -> None:
    unscored = [{**row, "labels": [-100] * len(row["labels"])} for row in NAMED]
    batch, where = collated(unscored)
    assert len(causal_positions(batch)) == 0
    signal = RoutedTeacher({name: HFTeacher(model) for name, model in models().items()}).signal(batch, where)
    assert len(signal) == 0 and signal.at(slice(None), 1.0).logp.shape == (0, V)


class Unusable(Fixed):
    """As a server that answers with NaN for one sample."""

    def __init__(self, signal: TeacherSignal | None, keep: list[bool], sample: int) -> None:
        super().__init__(signal or TeacherSignal(logits=torch.zeros(0, V)))
        self.keep, self.sample, self.left = torch.tensor(keep), sample, signal

    def signal(self, batch: Any, positions: Any, layers: tuple[int, ...] = ()) -> TeacherSignal:
        raise BadRowsError(keep=self.keep, signal=self.left, samples=[self.sample], reason="it is NaN")


def test_unusable_rows_of_one_teacher_leave_the_others() -> None:
    of_a, of_b = (torch.randn(n, V, dtype=torch.float64) for n in (2, 2))
    teachers = {
        "a": Fixed(TeacherSignal(logits=of_a)),
        "b": Unusable(TeacherSignal(logits=of_b), [False, False, False, True, True], 11),
        "c": Unusable(None, [False, False], 14),
    }
    batch, where = collated(NAMED)
    with pytest.raises(BadRowsError, match="sample 11, 14: it is NaN") as error:
        RoutedTeacher(teachers).signal(batch, where)
    assert error.value.keep.tolist() == [sample in (12, 13) for sample in batch["sample_id"][where.sequence].tolist()]
    assert error.value.signal is not None
    wanted = torch.cat([of_a, of_b]).log_softmax(-1)
    torch.testing.assert_close(error.value.signal.at(slice(None), 1.0).logp, wanted)
    with pytest.raises(BadRowsError) as error:
        RoutedTeacher({"b": teachers["c"], "c": teachers["c"]}).signal(*collated([NAMED[1] | {"teacher": "b"}, NAMED[3]]))
    assert error.value.signal is None and not error.value.keep.any()

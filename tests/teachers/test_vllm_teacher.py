"""VLLMTeacher against a server that answers like vLLM, rightly or in each of the wrong ways; real ones are in tests/vllm."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM

from kdlib.data.collate import DistillationCollator
from kdlib.data.positions import causal_positions
from kdlib.serving import BadRowsError
from kdlib.teachers import CachedTeacher, HFTeacher, VLLMTeacher
from kdlib.teachers.write_cache import write_cache
from kdlib.types import Support
from tests.serving.fake import Answer, FakeServer, refusal
from tests.tiny import tiny_llama, tiny_tokenizer

V = len(tiny_tokenizer())


@dataclass
class Engine:
    """What vLLM would answer for a model, with switches for what may be wrong with it."""

    model: LlamaForCausalLM
    hidden: bool = True
    tempers: bool = False
    logits: bool = False
    normalises: bool = False
    spoil: dict[int, Callable[[Any], Any]] = field(default_factory=dict)  # {first token of a row: what becomes of its answer}

    @torch.no_grad()
    def __call__(self, path: str, payload: dict[str, Any]) -> Answer:
        if path == "/pooling":
            return self._pooling(payload) if self.hidden else refusal(404, "Not Found")
        if self.hidden:
            return refusal(404, "Not Found")
        row = torch.tensor(payload["prompt"])
        logits = self.model(input_ids=row[None], use_cache=False).logits[0]
        logp = logits if self.logits else (logits / (payload["temperature"] if self.tempers else 1.0)).log_softmax(-1)
        listed = [None, *(self._entries(logp[t], int(row[t + 1]), payload["prompt_logprobs"]) for t in range(len(row) - 1))]
        spoil = self.spoil.get(int(row[0]), lambda x: x)
        return 200, {"choices": [{"prompt_logprobs": spoil(listed)}]}

    def _entries(self, logp: Tensor, own: int, k: int) -> dict[str, dict[str, Any]]:
        ids = [own, *(token for token in logp.topk(k).indices.tolist() if token != own)]
        return {str(token): {"logprob": float(logp[token]), "rank": 1, "decoded_token": "x"} for token in ids}

    def _pooling(self, payload: dict[str, Any]) -> Answer:
        items, content = [], b""
        for number, row in enumerate(payload["input"]):
            states = self.model.model(input_ids=torch.tensor(row)[None], use_cache=False).last_hidden_state[0]
            states = torch.nn.functional.normalize(states) if self.normalises else states
            states = self.spoil.get(row[0], lambda x: x)(states)
            wire = states.to(getattr(torch, payload["embed_dtype"])).contiguous().view(torch.uint8).numpy().tobytes()
            items.append({"index": number, "start": len(content), "end": len(content + wire), "shape": list(states.shape)})
            content += wire
        return 200, ({"data": items}, content)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher")
    tiny_llama(V).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def hf(checkpoint: Path) -> HFTeacher:
    return HFTeacher(str(checkpoint))


@pytest.fixture
def engine(hf: HFTeacher) -> Engine:
    assert isinstance(hf.model, LlamaForCausalLM)
    return Engine(hf.model)


@pytest.fixture
def server(engine: Engine, checkpoint: Path) -> Iterator[FakeServer]:
    with FakeServer(engine, root=str(checkpoint)) as server:
        yield server


def rows() -> list[dict[str, Any]]:
    """Four rows that begin with tokens 10, 11, 12 and 13, of samples 100 to 103."""
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 4, 11, 6)
    drawn = [[10 + n, *torch.randint(8, V, (length,), generator=generator).tolist()] for n, length in enumerate(lengths)]
    return [{"input_ids": ids, "labels": [-100, -100, *ids[2:]], "sample_id": 100 + n} for n, ids in enumerate(drawn)]


def batch_of(given: list[dict[str, Any]], *, flatten: bool = False) -> dict[str, Tensor]:
    return DistillationCollator(0, flatten=flatten)(given)


def expected(hf: HFTeacher, batch: dict[str, Tensor]) -> Tensor:
    return hf.signal(batch, causal_positions(batch)).at(slice(None), 1.0).logp


@pytest.mark.parametrize("flatten", [False, True])
def test_only_the_scored_part_of_each_row_is_sent(server: FakeServer, engine: Engine, hf: HFTeacher, flatten: bool) -> None:
    given = rows()
    given[2]["labels"][5:] = [-100] * (len(given[2]["labels"]) - 5)
    batch = batch_of(given, flatten=flatten)
    for engine.hidden, past_the_last in ((True, 0), (False, 1)):
        teacher = VLLMTeacher(server.url, k=V)
        server.seen.clear()
        signal = teacher.signal(batch, causal_positions(batch))
        sent = [row for _, _, payload in server.seen for row in payload.get("input", [payload.get("prompt")])]
        ends = {12: 3 + 1 + past_the_last}
        whole = [row["input_ids"][: ends.get(row["input_ids"][0], len(row["input_ids"]) - 1 + past_the_last)] for row in given]
        assert sorted(sent) == whole
        p = signal.at(slice(None), 1.0)
        found = p.logp if p.ids is None else torch.empty_like(p.logp).scatter(-1, p.ids, p.logp)
        torch.testing.assert_close(found, expected(hf, batch), rtol=0, atol=1e-5)


def test_hidden_states_travel_in_the_dtype_of_the_head(server: FakeServer) -> None:
    teacher, batch = VLLMTeacher(server.url, dtype="bfloat16"), batch_of(rows())
    signal = teacher.signal(batch, causal_positions(batch))
    assert server.seen[-1][2]["embed_dtype"] == "bfloat16"
    assert signal.hidden is not None and signal.hidden.dtype == torch.bfloat16


def test_many_rows_share_requests(server: FakeServer) -> None:
    given = [{**row, "sample_id": n} for n, row in enumerate(rows() * 5)]
    teacher, batch = VLLMTeacher(server.url, concurrency=4), batch_of(given)
    server.seen.clear()
    teacher.signal(batch, causal_positions(batch))
    assert len(server.seen) == 4


@pytest.mark.parametrize("kind", ["hidden", "topk"])
def test_the_vocabulary_is_cut_to_the_tokenizer(
    engine: Engine, server: FakeServer, hf: HFTeacher, kind: str, checkpoint: Path, tmp_path: Path
) -> None:
    padded = tiny_llama(V + 40)
    padded.lm_head.weight.data[V:] = 0.0
    padded.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    engine.model, engine.hidden = padded, kind == "hidden"
    server.models[0]["root"] = str(tmp_path)
    teacher, batch = VLLMTeacher(server.url, k=V + 40 if kind == "topk" else 64), batch_of(rows())
    teacher.check(tiny_tokenizer(), V)
    positions = causal_positions(batch)
    if kind == "topk":
        with pytest.raises(BadRowsError, match="only pad the teacher's vocabulary"):
            teacher.signal(batch, positions)
    else:
        reference = HFTeacher(padded, vocab_size=V)
        torch.testing.assert_close(
            teacher.signal(batch, positions).at(slice(None), 1.0).logp, expected(reference, batch), rtol=0, atol=1e-5
        )


def _none(listed: list[Any]) -> list[Any]:
    return [None] * len(listed)


def _short(listed: list[Any]) -> list[Any]:
    return listed[:-2]


def _impossible(listed: list[Any]) -> list[Any]:
    return [entry and {token: {"logprob": -9999.0} for token in entry} for entry in listed]


def _not_a_number(states: Tensor) -> Tensor:
    return states * torch.nan


@pytest.mark.parametrize(
    ("signal", "spoil", "reason"),
    [
        ("hidden", _not_a_number, "NaN or infinite"),
        ("topk", _none, "no log-probs for some"),
        ("topk", _short, "no log-probs for some"),
        ("sampled", _impossible, "probability 0"),
    ],
)
def test_bad_rows_are_reported_once_and_the_rest_is_kept(
    server: FakeServer,
    engine: Engine,
    hf: HFTeacher,
    caplog: pytest.LogCaptureFixture,
    signal: Any,
    spoil: Callable[[Any], Any],
    reason: str,
) -> None:
    engine.hidden, batch = signal == "hidden", batch_of(rows())
    positions = causal_positions(batch)
    teacher = VLLMTeacher(server.url, signal=signal, k=5)
    engine.spoil = {11: spoil, 13: spoil}
    with caplog.at_level(logging.WARNING, "kdlib.serving"):
        for _ in range(2):
            with pytest.raises(BadRowsError, match=f"samples? 101, 103: .*{reason}") as error:
                teacher.signal(batch, positions)
    assert len(caplog.records) == 2 and teacher.bad_rows == {101, 103} == set(error.value.samples)
    keep = (positions.sequence == 0) | (positions.sequence == 2)
    assert error.value.keep.equal(keep) and error.value.signal is not None
    p, reference = error.value.signal.at(slice(None), 1.0), expected(hf, batch)[keep]
    wanted = reference if p.ids is None else reference.gather(-1, p.ids)
    torch.testing.assert_close(p.logp, wanted, rtol=0, atol=1e-5)


def test_nothing_left_of_a_batch(server: FakeServer, engine: Engine) -> None:
    teacher, batch = VLLMTeacher(server.url), batch_of(rows()[:1])
    engine.spoil = {10: _not_a_number}
    with pytest.raises(BadRowsError) as error:
        teacher.signal(batch, causal_positions(batch))
    assert error.value.signal is None and not error.value.keep.any()


def test_a_request_that_fails_is_asked_again_row_by_row(server: FakeServer, engine: Engine) -> None:
    teacher = VLLMTeacher(server.url, concurrency=1)
    server.answer = lambda path, payload: (
        refusal(400, "not JSON compliant") if any(row[0] == 12 for row in payload["input"]) else engine(path, payload)
    )
    batch = batch_of(rows())
    with pytest.raises(BadRowsError, match="102") as error:
        teacher.signal(batch, causal_positions(batch))
    assert error.value.samples == [102]


def test_a_token_without_probability_stays_in_a_top_k(server: FakeServer, engine: Engine) -> None:
    engine.hidden, batch = False, batch_of(rows()[:1])
    teacher = VLLMTeacher(server.url, signal="topk", k=5)
    engine.spoil = {10: _impossible}
    signal = teacher.signal(batch, causal_positions(batch))
    assert signal.logp is not None and signal.rest is not None
    assert (signal.logp == -torch.inf).all() and signal.rest.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("switches", "options", "message"),
    [
        ({"hidden": True, "normalises": True}, {}, "normalises its hidden states.*use_activation"),
        ({"hidden": False, "logits": True}, {"k": 5}, "gives logits, not log-probs.*raw_logprobs"),
        ({"hidden": False}, {"temperature": 2.0}, "temperature 1, whatever is asked for"),
        ({"hidden": False, "tempers": True}, {"signal": "sampled", "temperature": 2.0}, "temperature 1, whatever"),
    ],
)
def test_servers_that_would_teach_something_else_are_refused(
    server: FakeServer, engine: Engine, switches: dict[str, bool], options: dict[str, Any], message: str
) -> None:
    for name, value in switches.items():
        setattr(engine, name, value)
    engine.model = tiny_llama(V, initializer_range=1.0) if engine.logits else engine.model  # the largest logits above 0
    with pytest.raises(ValueError, match=message) as error:
        VLLMTeacher(server.url, **options)
    assert "\n" not in str(error.value)


def test_a_server_that_proves_to_temper_may(server: FakeServer, engine: Engine, hf: HFTeacher) -> None:
    engine.hidden, engine.tempers, batch = False, True, batch_of(rows())
    signal = VLLMTeacher(server.url, k=V, temperature=2.0).signal(batch, causal_positions(batch))
    assert signal.temperature == 2.0 and signal.logp is not None and signal.ids is not None
    reference = hf.signal(batch, causal_positions(batch)).at(slice(None), 2.0).logp.gather(-1, signal.ids)
    torch.testing.assert_close(signal.logp, reference, rtol=0, atol=1e-5)


def test_several_served_models(server: FakeServer, checkpoint: Path) -> None:
    server.models.append({"id": "other", "root": "/elsewhere", "max_model_len": 64})
    with pytest.raises(ValueError, match=r"serves several models \(.*other.*teacher\): name one"):
        VLLMTeacher(server.url)
    assert VLLMTeacher(server.url, model="teacher").checkpoint == str(checkpoint)
    with pytest.raises(ValueError, match="serves several models"):
        VLLMTeacher(server.url, model="neither")


@pytest.mark.parametrize("model", ["student", "org/other-model"])
def test_the_wrong_model_behind_the_url(server: FakeServer, model: str) -> None:
    server.models[0]["root"] = "org/model"
    with pytest.raises(ValueError, match=f"does not serve {model}: it serves org/model, teacher"):
        VLLMTeacher(server.url, model=model)


def test_a_checkpoint_here_stands_for_the_server_s(server: FakeServer, checkpoint: Path) -> None:
    server.models[0]["root"] = "/only/there"
    with pytest.raises(ValueError, match="serves /only/there, which is not on this machine: set model"):
        VLLMTeacher(server.url)
    assert VLLMTeacher(server.url, model=str(checkpoint)).checkpoint == str(checkpoint)


def test_every_replica_is_looked_at(server: FakeServer, engine: Engine, checkpoint: Path) -> None:
    with FakeServer(Engine(engine.model, normalises=True), root=str(checkpoint)) as second:
        with pytest.raises(ValueError, match=f"{second.url} normalises"):
            VLLMTeacher([server.url, second.url])
        second.answer = engine
        teacher, batch = VLLMTeacher([server.url, second.url]), batch_of(rows())
        before = len(second.seen)
        teacher.signal(batch, causal_positions(batch))
        assert len(second.seen) - before == 2  # of four requests


def test_layers_and_k_are_refused(server: FakeServer) -> None:
    batch = batch_of(rows())
    with pytest.raises(ValueError, match="no hidden layers"):
        VLLMTeacher(server.url).signal(batch, causal_positions(batch), layers=(1,))
    with pytest.raises(ValueError, match="k must be at least 1"):
        VLLMTeacher(server.url, k=0)


def test_what_it_provides(server: FakeServer, engine: Engine) -> None:
    assert VLLMTeacher(server.url).provides is Support.FULL
    engine.hidden = False
    assert VLLMTeacher(server.url).provides is Support.TOPK
    assert VLLMTeacher(server.url, signal="sampled").provides is Support.SAMPLED_STUDENT


def test_a_cache_keeps_a_top_k_as_it_is(server: FakeServer, engine: Engine, hf: HFTeacher, tmp_path: Path) -> None:
    engine.hidden = False
    teacher, data = VLLMTeacher(server.url, k=6), Dataset.from_list(rows())
    settings: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "teacher_name": "t"}
    write_cache(teacher, data, directory=tmp_path / "served", k=6, **settings)
    write_cache(hf, data, directory=tmp_path / "hf", k=6, **settings)
    batch = batch_of(rows())
    served, local = (CachedTeacher(tmp_path / name).signal(batch, causal_positions(batch)) for name in ("served", "hf"))
    assert served.ids is not None and local.ids is not None and served.ids.equal(local.ids)
    assert served.rest is not None and local.rest is not None
    torch.testing.assert_close(served.logp, local.logp, rtol=2**-10, atol=1e-5)
    torch.testing.assert_close(served.rest, local.rest, rtol=2**-10, atol=1e-5)
    for options, message in (
        ({"k": 7}, "the top 7 are to be kept, the served teacher gives 6"),
        ({"k": 6, "kind": "sampled"}, "kind sampled needs whole distributions"),
        ({"k": 6, "temperature": 2.0}, "at temperature 1.0, 2.0 is asked for"),
    ):
        with pytest.raises(ValueError, match=message):
            write_cache(teacher, data, directory=tmp_path / "refused", **options, **settings)
    assert not (tmp_path / "refused").exists()


def test_a_cache_leaves_out_rows_without_an_answer(server: FakeServer, engine: Engine, tmp_path: Path) -> None:
    teacher, data = VLLMTeacher(server.url), Dataset.from_list(rows())
    engine.spoil = {11: _not_a_number}
    settings: dict[str, Any] = {"tokenizer": tiny_tokenizer(), "teacher_name": "t", "k": 4}
    index = write_cache(teacher, data, directory=tmp_path / "cache", **settings)
    assert index.shards[0].sequences == 3
    with pytest.raises(ValueError, match="1 of 4 training rows are not in the cache"):
        CachedTeacher(tmp_path / "cache").check_rows(data, what="training")
    engine.spoil = dict.fromkeys((10, 11, 12, 13), _not_a_number)
    with pytest.raises(ValueError, match="nothing usable for any row of shard 0"):
        write_cache(teacher, data, directory=tmp_path / "nothing", **settings)

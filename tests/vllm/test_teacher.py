"""Teachers served by real vLLM engines against the same checkpoint run by transformers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from kdlib.data.collate import DistillationCollator
from kdlib.data.positions import causal_positions
from kdlib.serving import BadRowsError, ServerAwayError
from kdlib.teachers import CachedTeacher, HFTeacher, VLLMTeacher
from kdlib.teachers.write_cache import write_cache
from kdlib.types import Support, Teacher, TeacherSignal
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.vllm.servers import ServedModel

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

Serve = Callable[..., ServedModel]

_COMMON = ("--served-model-name", "teacher", "--dtype", "float32", "--enforce-eager", "--max-model-len", "128")
_HIDDEN = ("--runner", "pooling", "--convert", "embed", "--pooler-config", '{"task":"token_embed","use_activation":false}')
V = len(tiny_tokenizer())
POISON = V - 1  # a token whose embedding is NaN: no row without it can tell


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("teacher") / "tiny"
    model = tiny_llama(V, hidden=128, tie_word_embeddings=False)
    model.get_input_embeddings().weight.data[POISON] = torch.nan
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def servers(checkpoint: Path, serve: Serve) -> dict[str, ServedModel]:
    """Both kinds of server, started at the same time."""
    started = {
        "hidden": serve(checkpoint, *_COMMON, *_HIDDEN, wait=False),
        "topk": serve(checkpoint, *_COMMON, "--max-logprobs", str(V), wait=False),
    }
    return {name: server.wait() for name, server in started.items()}


@pytest.fixture(scope="module")
def in_process(checkpoint: Path) -> Iterator[VLLMTeacher]:
    teacher = VLLMTeacher(str(checkpoint), signal="topk", k=V, max_model_len=128)
    yield teacher
    teacher.close()


@pytest.fixture(scope="module")
def hf(checkpoint: Path) -> HFTeacher:
    return HFTeacher(str(checkpoint))


def rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        length = int(torch.randint(5, 60, (1,), generator=generator))
        ids = torch.randint(8, POISON, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "sample_id": 100 + number})
    return made


def batch_of(given: list[dict[str, Any]], *, flatten: bool = False) -> dict[str, Tensor]:
    return DistillationCollator(0, flatten=flatten)(given)


def dense(signal: TeacherSignal) -> Tensor:
    """All log-probabilities [N, V] of a signal that has all of them."""
    p = signal.at(slice(None), 1.0)
    if p.ids is None:
        return p.logp
    assert p.logp.shape[1] == V
    return torch.full((len(signal), V), torch.nan).scatter(-1, p.ids, p.logp)


def all_logp(teacher: Teacher, batch: dict[str, Tensor]) -> Tensor:
    return dense(teacher.signal(batch, causal_positions(batch)))


@pytest.fixture(scope="module")
def in_process_hidden(checkpoint: Path) -> Iterator[VLLMTeacher]:
    teacher = VLLMTeacher(str(checkpoint), max_model_len=128)
    assert teacher.provides is Support.FULL
    yield teacher
    teacher.close()


@pytest.fixture(scope="module", params=["hidden", "topk", "in_process_hidden", "in_process"])
def whole(request: pytest.FixtureRequest, servers: dict[str, ServedModel]) -> VLLMTeacher:
    """Teachers that know all log-probabilities."""
    if request.param.startswith("in_process"):
        return request.getfixturevalue(request.param)
    return VLLMTeacher(servers[request.param].url + "/v1", k=V)


@pytest.mark.parametrize("flatten", [False, True], ids=["padded", "packed"])
def test_agrees_with_transformers(whole: VLLMTeacher, hf: HFTeacher, flatten: bool) -> None:
    batch = batch_of(rows(6), flatten=flatten)
    torch.testing.assert_close(all_logp(whole, batch), all_logp(hf, batch), rtol=0, atol=1e-4)


def test_a_teacher_with_its_own_input(whole: VLLMTeacher, hf: HFTeacher) -> None:
    given = rows(3)
    longer = [{**row, "input_ids": [9, 10, 11, *row["input_ids"]], "labels": [-100] * 3 + row["labels"]} for row in given]
    plain, own = batch_of(given), batch_of(longer)
    plain |= {"teacher_input_ids": own["input_ids"], "teacher_attention_mask": own["attention_mask"]}
    torch.testing.assert_close(all_logp(whole, plain), all_logp(hf, own), rtol=0, atol=1e-4)


def test_nothing_scored_is_an_empty_signal(whole: VLLMTeacher) -> None:
    batch = batch_of([{"input_ids": [9, 10], "labels": [-100, -100], "sample_id": 1}])
    assert len(whole.signal(batch, causal_positions(batch))) == 0


def test_a_cache_of_it_agrees(whole: VLLMTeacher, hf: HFTeacher, tmp_path: Path) -> None:
    given = rows(4)
    write_cache(
        whole,
        Dataset.from_list(given),
        directory=tmp_path / "cache",
        tokenizer=whole.tokenizer,
        teacher_name="t",
        k=V,
        bits=32,
        batch_size=2,
    )
    batch = batch_of(given)
    cached, expected = all_logp(CachedTeacher(tmp_path / "cache"), batch), all_logp(hf, batch)
    torch.testing.assert_close(cached, expected, rtol=0, atol=1e-4)


def test_a_bad_row_is_named_and_the_others_are_kept(
    whole: VLLMTeacher, hf: HFTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    given = rows(4)
    given[2]["input_ids"][1] = POISON
    batch = batch_of(given)
    positions = causal_positions(batch)
    with (
        caplog.at_level(logging.WARNING, "kdlib.serving"),
        pytest.raises(BadRowsError, match=r"sample 102.*(NaN|infinite)") as bad,
    ):
        whole.signal(batch, positions)
    assert bad.value.keep.equal(positions.sequence != 2) and bad.value.samples == [102] and whole.bad_rows == {102}
    assert "sample 102 cannot be used" in caplog.text
    assert bad.value.signal is not None
    expected = all_logp(hf, batch)[bad.value.keep]
    torch.testing.assert_close(dense(bad.value.signal), expected, rtol=0, atol=1e-4)
    wash(whole)


def wash(teacher: VLLMTeacher) -> None:
    """Rows long enough to write over every slot that the poisoned row used.

    vLLM 0.32 on CPU reuses its blocks of keys and values with NaN in them, and then shorter rows come out as NaN, too.
    """
    batch = batch_of([{"input_ids": [9] * 120, "labels": [9] * 120, "sample_id": number} for number in range(8)])
    teacher.signal(batch, causal_positions(batch))


def test_the_k_likeliest(servers: dict[str, ServedModel], hf: HFTeacher) -> None:
    teacher, batch = VLLMTeacher(servers["topk"].url, k=8), batch_of(rows(4))
    signal, everything = teacher.signal(batch, causal_positions(batch)), all_logp(hf, batch)
    expected = everything.topk(8)
    assert teacher.provides is Support.TOPK and signal.logp is not None and signal.ids is not None and signal.rest is not None
    torch.testing.assert_close(signal.logp, expected.values, rtol=0, atol=1e-4)
    assert signal.ids.equal(expected.indices)
    outside = everything.scatter(-1, expected.indices, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(signal.rest, outside, rtol=0, atol=1e-4)


def test_sequences_score_the_same_served_and_in_process(
    servers: dict[str, ServedModel], in_process: VLLMTeacher, hf: HFTeacher
) -> None:
    teacher, batch = VLLMTeacher(servers["topk"].url, signal="sampled"), batch_of(rows(6))
    positions = causal_positions(batch)
    signal = teacher.signal(batch, positions)
    assert teacher.provides is Support.SAMPLED_STUDENT and signal.ids is not None and signal.logp is not None
    assert signal.ids[:, 0].equal(positions.labels)
    scores = []
    for logp in (signal.logp, *(all_logp(t, batch).gather(-1, positions.labels[:, None]) for t in (in_process, hf))):
        scores.append(torch.zeros(6).index_add(0, positions.sequence, logp[:, 0]))
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=1e-3)
    torch.testing.assert_close(scores[0], scores[2], rtol=0, atol=1e-3)


def test_auto_is_what_the_server_gives(servers: dict[str, ServedModel]) -> None:
    assert {kind: VLLMTeacher(server.url, k=4).kind for kind, server in servers.items()} == {"hidden": "hidden", "topk": "topk"}
    assert VLLMTeacher(servers["hidden"].url).provides is Support.FULL


@pytest.mark.parametrize(
    ("server", "options", "message"),
    [
        ("topk", {"signal": "topk", "k": V + 1}, f"logprobs of {V + 1}.*greater than max allowed: {V}.*--max-logprobs {V + 1}"),
        ("topk", {"signal": "hidden"}, "gives no hidden states: start it with `vllm serve .*--runner pooling"),
        ("hidden", {"signal": "topk"}, "gives no log-probs: start it with `vllm serve .*--max-logprobs 64"),
        ("hidden", {"model": "another"}, "does not serve another: it serves .*teacher"),
        ("topk", {"signal": "topk", "temperature": 2.0}, "temperature 1, whatever is asked for"),
        ("topk", {"signal": "sampled", "temperature": 2.0}, "temperature 1, whatever is asked for"),
    ],
)
def test_what_a_server_cannot_give_is_said_at_the_start(
    servers: dict[str, ServedModel], server: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        VLLMTeacher(servers[server].url, **options)
    assert "\n" not in str(error.value)


def test_the_head_of_another_checkpoint_is_noticed(servers: dict[str, ServedModel], tmp_path: Path) -> None:
    other = tmp_path / "wider"
    tiny_llama(V, hidden=160).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    with pytest.raises(ValueError, match=r"are 128 wide, the head of .* takes 160"):
        VLLMTeacher(servers["hidden"].url, model=str(other))


def test_tokenizer_vocabulary_and_length_are_checked(servers: dict[str, ServedModel]) -> None:
    hidden, topk = VLLMTeacher(servers["hidden"].url), VLLMTeacher(servers["topk"].url)
    hidden.check(tiny_tokenizer(), V, max_length=128)
    topk.check(tiny_tokenizer(), V, max_length=127)
    with pytest.raises(ValueError, match=r"rows of 128 tokens are longer than .* takes .127.*--max-model-len 129"):
        topk.check(tiny_tokenizer(), V, max_length=128)
    with pytest.raises(ValueError, match=r"the student's tokenizer and that of the model .* differ.*id 300 is nothing"):
        hidden.check(tiny_tokenizer(vocab_size=300), 300)
    batch = batch_of([{"input_ids": [9] * 129, "labels": [9] * 129, "sample_id": 1}])
    with pytest.raises(ValueError, match=r"rows of 129 tokens are longer"):
        topk.signal(batch, causal_positions(batch))


# The two that kill a server come last.


def test_a_killed_server_is_waited_for(
    servers: dict[str, ServedModel], hf: HFTeacher, caplog: pytest.LogCaptureFixture
) -> None:
    server, batch = servers["hidden"], batch_of(rows(4))
    teacher = VLLMTeacher(server.url, patience=300)
    before = all_logp(teacher, batch)
    server.kill()
    restart = threading.Timer(2.0, server.start)
    restart.start()
    with caplog.at_level(logging.WARNING, "kdlib.serving"):
        after = all_logp(teacher, batch)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert "does not answer" in caplog.text and "answers again" in caplog.text


def test_a_server_that_stays_away_ends_the_run(servers: dict[str, ServedModel]) -> None:
    server, batch = servers["topk"], batch_of(rows(4))
    teacher = VLLMTeacher(server.url, k=4, patience=3)
    server.kill()
    with pytest.raises(ServerAwayError, match=rf"{server.url} for 3 seconds.*checkpoint.*same command resumes"):
        teacher.signal(batch, causal_positions(batch))
    with pytest.raises(ValueError, match=r"no vLLM server answers at .*start it with `vllm serve"):
        VLLMTeacher(server.url)

"""Prompts from rows, and shards that survive being killed anywhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from kdlib.data.draft import sample_id
from kdlib.data.traces import Batch, Prompts, Skipped, TraceIndex, TraceWriter, read_prompts, read_traces
from kdlib.data.traces.writer import cut_torn_line
from tests.tiny import CHATML_TEMPLATE, PLAIN_TEMPLATE, THINKING_TEMPLATE, TOOL_TEMPLATE, tiny_tokenizer

USER = {"role": "user", "content": "What is two plus two?"}
ANSWER = {"role": "assistant", "content": "Four."}


def prompts_of(*rows: dict[str, Any], template: str | None = PLAIN_TEMPLATE, **options: Any) -> tuple[Prompts, Any]:
    tokenizer = tiny_tokenizer(chat_template=template)
    return read_prompts(Dataset.from_list(list(rows)), tokenizer, **options), tokenizer


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"question": USER["content"], "answer": "4"}, [USER]),
        ({"prompt": USER["content"], "question": "not this"}, [USER]),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, [USER, ANSWER, USER]),
        ({"messages": [USER, ANSWER]}, [USER]),
        ({"messages": [USER, ANSWER, USER]}, [USER, ANSWER, USER]),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, [USER, ANSWER, USER]),
        ({"turns": [USER["content"], "And green?"]}, [USER]),
        ({"turns": ["not this"], "question": USER["content"]}, [USER]),
    ],
)
def test_what_is_asked(row: dict[str, Any], asked: list[dict[str, str]]) -> None:
    prompts, tokenizer = prompts_of(row)
    expected = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert (prompts[0].asked, prompts[0].ids) == (asked, expected)
    assert prompts[0].prompt_id == sample_id(expected, [])
    assert dict(prompts[0].row) == row


def test_texts_go_into_a_user_turn_where_there_is_a_template_or_as_they_are() -> None:
    row = {"prompt": "Two plus two is"}
    wrapped, tokenizer = prompts_of(row)
    assert wrapped[0].asked == [{"role": "user", "content": row["prompt"]}]
    for template, option in ((PLAIN_TEMPLATE, False), (None, None)):
        plain, tokenizer = prompts_of(row, template=template, apply_chat_template=option)
        assert plain[0].asked == row["prompt"] and plain[0].ids == tokenizer(row["prompt"])["input_ids"]
    with pytest.raises(ValueError, match="no chat template"):
        prompts_of(row, template=None, apply_chat_template=True)
    with pytest.raises(ValueError, match="no chat template"):
        prompts_of({"messages": [USER]}, template=None)


def test_template_variables_and_tools_come_from_the_options_and_the_row() -> None:
    def text(row: dict[str, Any], template: str, **options: Any) -> str:
        prompts, tokenizer = prompts_of(row, template=template, **options)
        return tokenizer.decode(prompts[0].ids)

    assert "<think></think>" not in text({"messages": [USER]}, THINKING_TEMPLATE)
    off = {"enable_thinking": False}
    assert text({"messages": [USER]}, THINKING_TEMPLATE, chat_template_kwargs=off).endswith("<think></think>")
    assert text({"messages": [USER], "chat_template_kwargs": off}, THINKING_TEMPLATE).endswith("<think></think>")
    tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert '"add"' in text({"messages": [USER], "tools": json.dumps([tool])}, TOOL_TEMPLATE)


def test_bad_rows_are_counted_by_reason_and_duplicates_asked_once() -> None:
    texts = ["one", "", "two", None, "one", "  ", "long " * 40, "three"]
    prompts, _ = prompts_of(*({"prompt": text, "answer": str(i)} for i, text in enumerate(texts)), longest=20)
    assert [prompts[i].row["answer"] for i in range(len(prompts))] == ["0", "2", "7"]
    assert prompts.skipped == {"an empty prompt": 3, "the prompt is longer than 20 tokens": 1}
    assert prompts.duplicates == 1
    nothing = "{% if false %}x{% endif %}"
    with pytest.raises(ValueError, match=r"no row has a usable prompt \(1 x an empty prompt\)"):
        prompts_of({"prompt": "one"}, template=nothing)
    with pytest.raises(ValueError, match="rename one to `prompt`, `messages` or `question`"):
        prompts_of({"text": "one"})
    unasked, _ = prompts_of({"messages": [USER]}, {"messages": [ANSWER]}, template=CHATML_TEMPLATE)
    assert unasked.skipped == {"a conversation that starts with its answer": 1}


def test_the_fingerprint_sees_prompts_order_and_everything_a_verifier_may_read() -> None:
    rows = [{"prompt": "one", "answer": "1"}, {"prompt": "two", "answer": "2"}]
    prints = [
        prompts_of(*changed)[0].fingerprint
        for changed in (rows, rows[::-1], [rows[0], {**rows[1], "answer": "3"}], [rows[0], {**rows[1], "prompt": "too"}])
    ]
    assert len(set(prints)) == 4 and prompts_of(*rows)[0].fingerprint == prints[0]


SETTINGS = {"model": "teacher", "rollout.temperature": 0.6}
DONE = [
    Batch(
        traces=[{"prompt_id": i, "completion": f"“{i}” \ud83d and\u2028more", "logp_sum": -0.1 * i}],
        skipped=[Skipped(prompt_id=i, generation=1, reason="empty", tokens=1)] if i % 2 else [],
    )
    for i in range(7)
]


def writer_of(directory: Path, settings: dict[str, Any] | None = None, **options: Any) -> TraceWriter:
    sizes = {"prompts": 7, "rows_per_shard": 4, "prompts_per_batch": 1}
    return TraceWriter(directory, SETTINGS if settings is None else settings, **sizes, **options)


def write_missing(directory: Path) -> int:
    """Writes what is missing; returns how many batches were made."""
    writer, made = writer_of(directory), 0
    for shard in writer.missing:
        done = writer.kept(shard)
        for numbers in writer.batches(shard)[len(done) :]:
            done.append(DONE[numbers.start])
            writer.append(shard, done[-1])
            made += 1
        writer.finish(shard, done)
    writer.close()
    return made


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_traces_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert write_missing(tmp_path) == 7
    assert sorted(content(tmp_path)) == ["index.json", "shard-00000.jsonl", "shard-00001.jsonl"]
    assert [trace["prompt_id"] for trace in read_traces(tmp_path)] == list(range(7))
    assert [dict(trace) for trace in read_traces(tmp_path)] == [batch.traces[0] for batch in DONE]
    shards = TraceIndex.load(tmp_path).shards
    assert [shard.prompts for shard in shards.values()] == [4, 3]
    assert [skipped.prompt_id for shard in shards.values() for skipped in shard.skipped] == [1, 3, 5]
    assert write_missing(tmp_path) == 0


def test_wherever_a_partial_file_is_cut_the_result_is_the_same(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    write_missing(whole)
    expected = content(whole)

    started = tmp_path / "started"
    writer = writer_of(started)
    for number in range(3):
        writer.append(0, DONE[number])
    writer.close()
    partial = (started / "shard-00000.partial.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(partial) if byte == ord("\n")]
    for cut in sorted({0, 1, *ends, *(end - 1 for end in ends), len(partial) // 2, len(partial) - 2}):
        again = tmp_path / f"cut-{cut}"
        shutil.copytree(started, again)
        (again / "shard-00000.partial.jsonl").write_bytes(partial[:cut])
        kept = sum(end <= cut for end in ends)
        assert write_missing(again) == 7 - kept
        assert content(again) == expected, cut


def test_damaged_shards_are_written_again_and_not_read(tmp_path: Path) -> None:
    write_missing(tmp_path)
    expected = content(tmp_path)
    shard = tmp_path / "shard-00001.jsonl"
    for damage in (expected[shard.name][:-3], expected[shard.name].replace(b"completion", b"CompletioN"), None):
        shard.unlink()
        if damage is not None:
            shard.write_bytes(damage)
        with pytest.raises(ValueError, match=r"shard-00001.jsonl is (truncated|altered|missing)"):
            list(read_traces(tmp_path))
        assert write_missing(tmp_path) == 3
        assert content(tmp_path) == expected
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index.json is damaged .* --overwrite true"):
        writer_of(tmp_path)


def test_another_run_is_refused_unless_overwritten(tmp_path: Path) -> None:
    write_missing(tmp_path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"made with other options \(rollout.temperature: 0.6 -> 1.0; new: null -> 1\)"):
        writer_of(tmp_path, {"model": "teacher", "rollout.temperature": 1.0, "new": 1})
    assert content(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    writer = writer_of(tmp_path, {"model": "other"}, overwrite=True)
    assert writer.missing == [0, 1] and sorted(content(tmp_path)) == ["index.json", "notes.txt"]
    writer.close()

    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"holds no traces \(thesis.tex"):
        writer_of(other, overwrite=True)
    assert sorted(content(other)) == ["thesis.tex"]
    with pytest.raises(ValueError, match="is a file"):
        writer_of(tmp_path / "notes.txt")


def test_two_processes_do_not_write_to_one_directory(tmp_path: Path) -> None:
    first = writer_of(tmp_path)
    with pytest.raises(ValueError, match="another kdlib generate is writing"):
        writer_of(tmp_path)
    first.close()
    writer_of(tmp_path).close()


def test_unfinished_traces_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="kdlib generate"):
        list(read_traces(tmp_path))
    writer_of(tmp_path).close()
    with pytest.raises(ValueError, match="unfinished"):
        list(read_traces(tmp_path))


@pytest.mark.parametrize(("before", "after"), [("a\nb", "a\n"), ("a\n", "a\n"), ("a", ""), ("", "")])
def test_a_torn_line_is_cut_off(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "lines"
    path.write_text(before)
    cut_torn_line(path)
    assert path.read_text() == after

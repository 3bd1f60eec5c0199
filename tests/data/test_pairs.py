"""Pairs of answers: where they come from, which are made of many answers, and how they stand in a batch."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from kdlib.data import DistillationCollator, prepare_dataset
from kdlib.data.pairs import PairCollator, load_pairs, prepare_pairs, preview_pairs
from kdlib.data.pairs.source import paired
from kdlib.data.positions import causal_positions
from kdlib.data.traces import Batch, TraceWriter
from kdlib.tokenizers.identity import tokenizer_fingerprint
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
ASKED = [{"role": "user", "content": "What is two plus two?"}]
RIGHT = [{"role": "assistant", "content": "Two and two make four."}]
WRONG = [{"role": "assistant", "content": "It is five."}]
CHAT = {"prompt": ASKED, "chosen": RIGHT, "rejected": WRONG}
TEXT = {"prompt": "Two plus two is", "chosen": " four.", "rejected": " the blue sky."}


def trace(prompt: int, generation: int, *, correct: bool | None, finish: str = "stop", **more: Any) -> dict[str, Any]:
    """A line of ``kdlib generate`` whose answer's tokens are not those of its text."""
    asked, answer = [5, 6, 7 + prompt], [20 + 2 * generation, 21 + 2 * generation, 2]
    return {
        "prompt_id": prompt,
        "generation": generation,
        "count": 1,
        "prompt": ASKED,
        "completion": f"answer {generation}",
        "input_ids": asked + answer,
        "labels": [-100] * 3 + answer,
        "finish": finish,
        "tokenizer": tokenizer_fingerprint(TOKENIZER),
        "correct": correct,
        **more,
    }


def pairs(*rows: dict[str, Any], tokenizer: Any = TOKENIZER, max_length: int = 64, **options: Any) -> Any:
    return prepare_pairs(Dataset.from_list(list(rows)), tokenizer, max_length=max_length, **options)


def answers(prepared: Any) -> list[tuple[list[int], list[int]]]:
    """The scored tokens of both answers of each pair."""
    return [
        tuple([label for label in row[name] if label != -100] for name in ("labels", "rejected_labels"))  # type: ignore[misc]
        for row in prepared.dataset
    ]


@pytest.mark.parametrize("row", [CHAT, TEXT], ids=["messages", "text"])
def test_each_answer_is_the_row_that_it_would_be_alone(row: dict[str, Any]) -> None:
    made = pairs(row).dataset[0]
    for prefix, side in (("", "chosen"), ("rejected_", "rejected")):
        alone = Dataset.from_list([{"prompt": row["prompt"], "completion": row[side]}])
        expected = prepare_dataset(alone, TOKENIZER, max_length=64).dataset[0]
        for name in ("input_ids", "labels", "sample_id"):
            assert made[prefix + name] == expected[name]


def test_traces_are_paired_as_the_tokens_that_were_drawn() -> None:
    found = pairs(trace(0, 0, correct=True), trace(0, 1, correct=False), trace(1, 0, correct=False), trace(1, 1, correct=True))
    assert answers(found) == [([20, 21, 2], [22, 23, 2]), ([22, 23, 2], [20, 21, 2])]
    assert [row["input_ids"][2] for row in found.dataset] == [7, 8]
    assert found.skipped == 0


@pytest.mark.parametrize(
    ("right", "wrong", "most", "expected"),
    [
        ([1, 2], [8], 1, [(1, 8)]),
        ([1, 2], [8], 9, [(1, 8), (2, 8)]),
        ([1, 2, 3], [8, 9], 9, [(1, 8), (2, 9), (3, 8)]),
        ([1], [7, 8, 9], 2, [(1, 7), (1, 8)]),
        ([1, 2], [], 9, [(1, None), (2, None)]),
        ([], [8, 9], 9, []),
    ],
)
def test_which_pairs_are_made(right: list[int], wrong: list[int], most: int, expected: list[Any]) -> None:
    assert paired(right, wrong, max_pairs=most) == expected


def test_answers_of_one_kind_are_counted_and_right_ones_may_be_kept(caplog: pytest.LogCaptureFixture) -> None:
    rows = [trace(0, 0, correct=True), trace(0, 1, correct=False), trace(1, 0, correct=True), trace(1, 1, correct=True)]
    rows += [trace(2, 0, correct=False), trace(3, 0, correct=None)]
    with caplog.at_level(logging.WARNING, logger="kdlib"):
        dropped = pairs(*rows)
    assert dropped.reasons == {
        "a prompt with right answers alone": 1,
        "a prompt with wrong answers alone": 1,
        "an answer without a verdict": 1,
    }
    assert caplog.messages == [
        "1 pairs; left out: 1 x an answer without a verdict, 1 x a prompt with right answers alone, "
        "1 x a prompt with wrong answers alone"
    ]
    kept = pairs(*rows, unpaired="positives", max_pairs=4)
    assert answers(kept) == [([20, 21, 2], [22, 23, 2]), ([20, 21, 2], []), ([22, 23, 2], [])]
    assert kept.reasons == {"a prompt with wrong answers alone": 1, "an answer without a verdict": 1}


def test_a_rejected_of_null_is_none() -> None:
    rows = [TEXT, {**TEXT, "rejected": None}]
    assert len(pairs(*rows).dataset) == 1
    assert [bool(row["rejected_input_ids"]) for row in pairs(*rows, unpaired="positives").dataset] == [True, False]


def test_a_student_with_other_tokens_reads_the_text_of_what_was_not_cut() -> None:
    other = tiny_tokenizer(vocab_size=340)
    rows = [trace(0, 0, correct=True), trace(0, 1, correct=False), trace(0, 2, correct=False, finish="length")]
    found = pairs(*rows, tokenizer=other, max_pairs=4)
    assert [[other.decode(ids) for ids in pair] for pair in answers(found)] == [["answer 0<|eos|>", "answer 1<|eos|>"]]
    assert found.reasons == {"an answer that was cut, in another tokenizer's tokens": 1}
    assert len(pairs(*rows, max_pairs=4).dataset) == 2, "in its own tokens a cut answer has no end to unlearn"


def test_lengths_are_those_after_the_cut() -> None:
    """The published code divides by the lengths from before it."""
    long = {**TEXT, "rejected": " blue" * 40}
    made = pairs(long, max_length=16)
    right, wrong = answers(made)[0]
    assert len(made.dataset[0]["rejected_input_ids"]) == 16 and made.truncated == 1
    assert right and len(wrong) == 16 - len(TOKENIZER.encode(TEXT["prompt"]))


def test_a_skipped_answer_takes_its_pair_with_it() -> None:
    bad = {**TEXT, "chosen": ""}
    found = pairs(TEXT, bad, skip_bad_rows=True)
    assert len(found.dataset) == 1 and found.reasons == {"an empty completion": 1, "an answer that was skipped": 1}
    with pytest.raises(ValueError, match="row 1: an empty completion"):
        pairs(TEXT, bad)


def test_columns_are_kept_beside_the_right_answers_row() -> None:
    rows = [trace(i, g, correct=g == 1, difficulty=i / 4) for i in range(3) for g in range(2)]
    assert pairs(*rows, columns=("difficulty",)).dataset["difficulty"][:] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], "pairs are a directory of kdlib generate --verify, or rows with prompt, chosen"),
        ([trace(0, 0, correct=True)], "no prompt has a right and a wrong answer .1 x a prompt with right answers alone."),
        ([trace(0, 0, correct=False)], "1 x a prompt with wrong answers alone.: draw more"),
        ([{**TEXT, "rejected": None}], "no prompt has a right and a wrong answer"),
    ],
)
def test_what_holds_no_pairs_is_one_line(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        pairs(*rows, unpaired="positives")
    assert "\n" not in str(caught.value)


# Directories


def written(directory: Path, rows: list[dict[str, Any]], *, judged: bool = True) -> str:
    """A directory as ``kdlib generate`` leaves it."""
    writer = TraceWriter(directory, {}, prompts=1, rows_per_shard=1, prompts_per_batch=1)
    writer.finish(0, [Batch(traces=rows, skipped=[])])
    writer.close()
    for name, verdict in (("correct", True), ("incorrect", False)) if judged else ():
        lines = [json.dumps(row) + "\n" for row in rows if row["correct"] is verdict]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    return str(directory)


def test_a_directory_of_traces_is_read_and_checked(tmp_path: Path) -> None:
    rows = [trace(0, 0, correct=False), trace(0, 1, correct=True), trace(0, 2, correct=None)]
    name = written(tmp_path / "traces", rows)
    found = load_pairs(name)
    assert found["generation"][:] == [1, 0]
    assert answers(prepare_pairs(found, TOKENIZER, max_length=64)) == [([22, 23, 2], [20, 21, 2])]
    (tmp_path / "traces" / "shard-00000.jsonl").write_text("altered")
    with pytest.raises(ValueError, match=r"altered|bytes|size"):
        load_pairs(name)


def test_a_directory_without_verdicts_says_what_to_do(tmp_path: Path) -> None:
    name = written(tmp_path / "traces", [trace(0, 0, correct=None)], judged=False)
    with pytest.raises(ValueError, match="no completion with a verdict: run kdlib generate with --verify"):
        load_pairs(name)


def test_files_of_pairs_are_read_as_any_others(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(json.dumps(TEXT) + "\n")
    assert load_pairs(str(tmp_path / "pairs.jsonl"))[0] == TEXT


# Batches


def test_both_answers_of_a_pair_stand_in_its_batch() -> None:
    rows = [TEXT, {**TEXT, "prompt": "Three is", "rejected": None}, {**TEXT, "prompt": "Is it"}]
    made = list(pairs(*rows, unpaired="positives").dataset)
    batch = PairCollator(0)(made)
    assert batch["sequence"][:, 0].tolist() == [0, 1, 2, 4, 5]
    assert (batch["sequence"] == batch["sequence"][:, :1]).all()
    right = DistillationCollator(0)([{name: row[name] for name in ("input_ids", "labels", "sample_id")} for row in made])
    assert torch.equal(batch["labels"][[0, 2, 3], : right["labels"].shape[1]], right["labels"])
    found = causal_positions(batch)
    scored = {pair: [t for t in row["rejected_labels"] if t != -100] for pair, row in enumerate(made)}
    for pair, tokens in scored.items():
        assert found.labels[found.sequence == 2 * pair + 1].tolist() == tokens


def test_the_preview_shows_right_answers_and_then_wrong_ones() -> None:
    text = preview_pairs(pairs(TEXT).dataset, TOKENIZER, count=1).plain
    assert text.index("made likelier") < text.index("⟦ four.") < text.index("made less likely") < text.index("⟦ the blue sky.")

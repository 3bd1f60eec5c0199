"""Batches of rows that two models read in tokens of their own, and completions that the teacher reads from their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from datasets import Dataset

from kdlib.data import DistillationCollator
from kdlib.data.aligned import AlignedCollator, Reader, TextRow, aligned, prepare_aligned
from kdlib.data.draft import UNSCORED, last_span
from kdlib.data.rollout_rows import prompt_ids, with_completion
from tests.data.aligned_cases import conversation, rows_of, speaker

TALKS = [("two?", "four"), ("How many clips?", "She sold 48/2 = 24 clips."), ("so?", "so", "and in all?", "72 in all")]
SMILE = "😀".encode()


def rows_of_both(a: Reader, b: Reader, talks: Sequence[tuple[str, ...]] = TALKS, **options: Any) -> list[dict[str, Any]]:
    rows = Dataset.from_list([{"messages": conversation(*talk)} for talk in talks])
    return list(prepare_aligned(rows, a, b, max_length=200, **options).dataset)


def collator(a: Reader, b: Reader) -> AlignedCollator:
    return AlignedCollator(student=a, teacher=b, closing=b.tokenizer.eos_token_id)


def encoded(reader: Reader, text: str) -> list[int]:
    """Tokens of a text that goes on from a letter."""
    before = reader.tokenizer.encode("\n", add_special_tokens=False)
    ids = reader.tokenizer.encode("\n" + text, add_special_tokens=False)
    return ids[len(before) :]


class TestBatches:
    def test_each_side_is_an_ordinary_batch(self) -> None:
        a, b = speaker("byte-level", "chatml"), speaker("bytes", "llama3")
        rows = rows_of_both(a, b)
        batch = collator(a, b)(rows)
        plain = DistillationCollator(a.tokenizer.pad_token_id)(rows)
        names = {"input_ids": "teacher_ids", "labels": "teacher_labels", "sample_id": "teacher_sample_id"}
        theirs = DistillationCollator(b.tokenizer.pad_token_id)([{k: row[v] for k, v in names.items()} for row in rows])
        for made, wanted in ((batch, plain), (batch["other"], theirs)):
            assert all(torch.equal(made[name], wanted[name]) for name in wanted)
        assert batch["unread"].tolist() == [False] * 3

    def test_a_tokenizer_without_a_padding_token(self) -> None:
        a, b = speaker("byte-level", "chatml"), Reader(deepcopy(speaker("unigram", "llama3").tokenizer))
        rows = rows_of_both(a, b)
        expected = collator(a, b)(rows)["other"]
        for end in (b.tokenizer.eos_token, None):
            b.tokenizer.pad_token, b.tokenizer.eos_token = None, end
            made = AlignedCollator(student=a, teacher=b, closing=None)(rows)["other"]
            read = expected["attention_mask"] == 1
            assert torch.equal(made["attention_mask"], expected["attention_mask"])
            assert (
                torch.equal(made["input_ids"][read], expected["input_ids"][read]) and (made["labels"][~read] == UNSCORED).all()
            )

    def test_padding_changes_no_chunk(self) -> None:
        a, b = speaker("byte-level", "chatml"), speaker("unigram", "llama3")
        rows = rows_of_both(a, b)
        batch = collator(a, b)(rows)
        assert (batch["attention_mask"] == 0).any() and (batch["other"]["attention_mask"] == 0).any()
        for i, row in enumerate(rows):
            alone = collator(a, b)([row])
            for made, one in ((batch, alone), (batch["other"], alone["other"])):
                width = one["chunk"].shape[1]
                assert torch.equal(made["chunk"][i, :width], one["chunk"][0]) and (made["chunk"][i, width:] == -1).all()
            assert batch["chunk"][i].max() == batch["other"]["chunk"][i].max() >= 0

    def test_rows_without_scored_tokens_are_scored_on_neither_side(self) -> None:
        a, b = speaker("byte-level", "chatml"), speaker("unigram", "llama3")
        rows = rows_of_both(a, b)
        rows[1] = {**rows[1], "labels": [UNSCORED] * len(rows[1]["labels"])}
        batch = collator(a, b)(rows)
        assert (batch["other"]["labels"][1] == UNSCORED).all() and (batch["other"]["chunk"][1] == -1).all()
        assert (batch["other"]["labels"][0] != UNSCORED).any() and batch["unread"].tolist() == [False] * 3

    def test_a_turn_of_another_text_is_unread(self) -> None:
        a, b = speaker("byte-level", "chatml"), speaker("unigram", "llama3")
        first, second, _ = rows_of_both(a, b)
        mixed = {**first, **{name: second[name] for name in ("teacher_ids", "teacher_labels", "teacher_sample_id")}}
        assert collator(a, b)([mixed, second])["unread"].tolist() == [True, False]


def generated(a: Reader, b: Reader, ids: list[int], *, talk: tuple[str, ...] = TALKS[2]) -> tuple[dict[str, Any], list[int]]:
    """The batch of one row with a completion of the student, and the teacher's tokens of its prompt."""
    (row,) = rows_of_both(a, b, [talk])
    made = with_completion(row, ids)
    text = b.tokenizer.apply_chat_template(conversation(*talk[:-1]), add_generation_prompt=True, tokenize=False)
    return collator(a, b)([made]), b.tokenizer.encode(text, add_special_tokens=False)


def answer(batch: dict[str, Any], prompt: list[int]) -> list[int]:
    """The teacher's tokens behind its prompt, which alone are scored."""
    ids, labels = batch["other"]["input_ids"][0].tolist(), batch["other"]["labels"][0].tolist()
    assert ids[: len(prompt)] == prompt and labels == [UNSCORED] * len(prompt) + ids[len(prompt) :]
    return ids[len(prompt) :]


class TestGenerated:
    @pytest.mark.parametrize("name", ["bytes", "unigram", "llama2", "unigram first", "byte-level prefix"])
    def test_the_teacher_reads_the_bytes_behind_its_own_prompt(self, name: str) -> None:
        a, b = speaker("digits", "chatml"), speaker(name, "llama3")
        for text in ("So it is 72.", " 72", "\n\n72", "72\n", "1 and 2", "  two  "):
            batch, prompt = generated(a, b, [*encoded(a, text), a.tokenizer.eos_token_id])
            made = answer(batch, prompt)
            assert b.text(made[:-1]) == text.encode() and made[-1] == b.tokenizer.eos_token_id
            chunk = batch["chunk"][0]
            assert chunk[-1] == chunk.max() == batch["other"]["chunk"][0, -1] and batch["unread"].tolist() == [False]
            assert (chunk[-len(encoded(a, text)) - 1 :] >= 0).all()

    def test_a_completion_that_was_cut_has_no_end(self) -> None:
        a, b = speaker("digits", "chatml"), speaker("unigram", "llama3")
        batch, prompt = generated(a, b, encoded(a, "So it is"))
        assert b.text(answer(batch, prompt)) == b"So it is"
        assert batch["chunk"][0, -1] == batch["chunk"].max() >= 0

    @pytest.mark.parametrize("closed", [False, True])
    def test_it_is_cut_behind_what_is_no_utf8(self, closed: bool) -> None:
        a, b = speaker("bytes", "chatml"), speaker("unigram", "llama3")
        end = [a.tokenizer.eos_token_id] if closed else []
        broken = [a.pieces.index(bytes([byte])) for byte in SMILE[:3]]
        batch, prompt = generated(a, b, [*encoded(a, "So é "), *broken, *end])
        assert b.text(answer(batch, prompt)) == "So é ".encode()
        assert (batch["chunk"][0, -len(broken) - len(end) :] == -1).all() and batch["chunk"].max() >= 1
        assert batch["unread"].tolist() == [False]

    def test_nothing_but_the_end(self) -> None:
        a, b = speaker("digits", "chatml"), speaker("unigram", "llama3")
        batch, prompt = generated(a, b, [a.tokenizer.eos_token_id])
        assert answer(batch, prompt) == [b.tokenizer.eos_token_id]
        assert batch["chunk"][0].tolist().count(0) == 1 == batch["other"]["chunk"][0].tolist().count(0)

    def test_special_tokens_within_are_what_they_are_called(self) -> None:
        a, b = speaker("digits", "chatml"), speaker("unigram", "llama3")
        start = a.tokenizer.convert_tokens_to_ids("<|im_start|>")
        batch, prompt = generated(a, b, [*encoded(a, "So"), start, *encoded(a, " it"), a.tokenizer.eos_token_id])
        assert b.text(answer(batch, prompt)[:-1]) == b"So<|im_start|> it" and batch["unread"].tolist() == [False]

    @pytest.mark.parametrize("name", ["unigram NFKC", "byte-level lowercase", "unigram without bytes"])
    def test_a_text_that_the_teacher_cannot_read(self, name: str) -> None:
        a, b = speaker("digits", "chatml"), speaker(name, "llama3")
        batch, prompt = generated(a, b, [*encoded(a, "So ½ of IT 😀"), a.tokenizer.eos_token_id], talk=("two?", "so"))
        assert answer(batch, prompt) == [] and batch["unread"].tolist() == [True]
        assert (batch["chunk"] == -1).all() and (batch["other"]["chunk"] == -1).all()

    def test_ids_beyond_the_tokenizer(self) -> None:
        a, b = speaker("digits", "chatml"), speaker("unigram", "llama3")
        batch, prompt = generated(a, b, [*encoded(a, "So"), len(a.tokenizer) + 3, a.tokenizer.eos_token_id])
        assert b.text(answer(batch, prompt)) == b"So" and batch["chunk"][0, -2:].tolist() == [-1, -1]

    def test_what_opens_the_teachers_answers_stays(self) -> None:
        a = speaker("digits", "chatml")
        for template, opening in (("qwen3", b"<think>\n\n</think>\n\n"), ("gpt_oss", b"<|channel|>final<|message|>")):
            b = speaker("bytes", template)
            (row,) = rows_of_both(a, b, [("two?", "four")])
            batch = collator(a, b)([with_completion(row, encoded(a, "It is 4"))])
            ids, labels = batch["other"]["input_ids"][0].tolist(), batch["other"]["labels"][0].tolist()
            before = [i for i, label in zip(ids, labels, strict=True) if label == UNSCORED]
            assert b.text(before).endswith(b"assistant\n" + opening if template == "qwen3" else b"assistant" + opening)
            assert b.text(ids[len(before) :]) == b"It is 4"

    def test_a_turn_before_which_the_teachers_row_ends(self) -> None:
        a, b = speaker("digits", "chatml"), speaker("unigram", "llama3")
        (row,) = rows_of_both(a, b, TALKS[2:])
        batch = collator(a, b)([with_completion({**row, "teacher_start": -1}, encoded(a, "72 in all"))])
        assert (batch["other"]["labels"] == UNSCORED).all() and batch["unread"].tolist() == [True]

    def test_prompts_alone(self) -> None:
        a, b = speaker("digits", "chatml"), speaker("unigram", "mistral")
        (row,) = rows_of_both(a, b, [("so?", "so", "and?")], prompts_only=True)
        assert prompt_ids(row) == row["input_ids"]
        made = with_completion(row, [*encoded(a, "72"), a.tokenizer.eos_token_id])
        batch = collator(a, b)([row, made])
        assert answer({"other": {k: v[1:] for k, v in batch["other"].items()}}, row["teacher_ids"])
        assert (batch["chunk"][0] == -1).all() and batch["chunk"][1].max() >= 1 and batch["unread"].tolist() == [False, False]


def test_the_cut_teacher_of_a_longer_conversation() -> None:
    """The completion is for the student's last turn: the teacher reads it there, or not at all."""
    a, b = speaker("digits", "chatml"), speaker("bytes", "llama3")
    talk = ("two?", "It is four.", "Why did she sell half as many clips in May? " * 3, "So.")
    rows = Dataset.from_list([{"messages": conversation(*talk)}])
    for length in (500, last_span(rows_of(conversation(*talk), b)[0].labels)[0]):
        (row,) = prepare_aligned(rows, a, b, max_length=length).dataset
        made = with_completion(row, [*encoded(a, "So it is."), a.tokenizer.eos_token_id])
        batch = collator(a, b)([made])
        asked = b"Why" in a.text(prompt_ids(row)), b"Why" in b.text(row["teacher_ids"][: max(row["teacher_start"], 0)])
        assert asked[0]  # or the test shows nothing
        assert bool((batch["other"]["chunk"] >= 0).any()) == asked[1] == (length == 500)


class TestContinued:
    @pytest.mark.parametrize("name", ["byte-level", "bytes", "unigram", "unigram first", "unigram never", "llama2"])
    @pytest.mark.parametrize("text", ["", "a", " a", "  a", "\n", "\n\na", "1", ": b", "é", "▁"])
    def test_the_text_and_nothing_before_it(self, name: str, text: str) -> None:
        reader = speaker(name, "chatml")
        if text == "▁" and name not in ("byte-level", "bytes"):
            with pytest.raises(ValueError, match="the tokens of '▁' spell another text"):
                reader.continued(text)
        else:
            assert reader.text(reader.continued(text)) == text.encode()


def test_text_of_a_row_and_its_aligned_view_agree() -> None:
    """What the collator finds is what ``aligned`` finds of the rows as they are."""
    a, b = speaker("byte-level", "chatml"), speaker("unigram", "llama3")
    rows = rows_of_both(a, b)
    batch = collator(a, b)(rows)
    for i, row in enumerate(rows):
        found = aligned(
            TextRow(input_ids=row["input_ids"], labels=row["labels"], reader=a),
            TextRow(input_ids=row["teacher_ids"], labels=row["teacher_labels"], reader=b),
        )
        assert batch["chunk"][i, : len(found.student)].tolist() == found.student.tolist()
        assert batch["other"]["chunk"][i, : len(found.teacher)].tolist() == found.teacher.tolist()

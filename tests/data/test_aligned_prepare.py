"""Datasets -> rows of student and teacher: which are paired, which are skipped, and what is counted."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from kdlib.data import Prepared, load_rows
from kdlib.data.aligned import Aligned, Reader, TextRow, aligned, prepare, prepare_aligned
from kdlib.data.draft import UNSCORED, first_scored, last_span, sample_id
from tests.data.aligned_cases import conversation, rows_of, speaker
from tests.tiny import THINKING_TEMPLATE, tiny_tokenizer
from tests.tokenizers.families import family

ASKED = "How many clips did she sell?"
LONG = "Natalia sold half as many in May, and then some more. " * 4


def chatted(*conversations: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"messages": conversation(*contents)} for contents in conversations]


def prepared(
    rows: list[dict[str, Any]] | Dataset, a: Reader | None = None, b: Reader | None = None, **options: Any
) -> Prepared:
    a, b = a or speaker("byte-level", "chatml"), b or speaker("unigram", "llama3")
    given = Dataset.from_list(rows) if isinstance(rows, list) else rows
    return prepare_aligned(given, a, b, **{"max_length": 512, **options})


def pair(row: dict[str, Any], a: Reader | None = None, b: Reader | None = None) -> Aligned:
    a, b = a or speaker("byte-level", "chatml"), b or speaker("unigram", "llama3")
    return aligned(
        TextRow(input_ids=row["input_ids"], labels=row["labels"], reader=a),
        TextRow(input_ids=row["teacher_ids"], labels=row["teacher_labels"], reader=b),
    )


def answers(row: dict[str, Any], reader: Reader, *, of_teacher: bool = False) -> bytes:
    """What is scored of a row."""
    ids, labels = ("teacher_ids", "teacher_labels") if of_teacher else ("input_ids", "labels")
    return reader.text([i for i, label in zip(row[ids], row[labels], strict=True) if label != UNSCORED])


class TestRows:
    def test_both_sides_are_the_rows_of_their_own_tokenizer(self) -> None:
        talks = [(ASKED, "48."), ("Why?", "Because she sold 48.", "Really?", "Yes.")]
        made = prepared(chatted(*talks))
        assert set(made.dataset.column_names) == {
            "input_ids",
            "labels",
            "sample_id",
            "teacher_ids",
            "teacher_labels",
            "teacher_sample_id",
            "teacher_start",
        }
        for row, talk in zip(made.dataset, talks, strict=True):
            ours = rows_of(conversation(*talk), speaker("byte-level", "chatml"))[0]
            theirs = rows_of(conversation(*talk), speaker("unigram", "llama3"))[0]
            assert (row["input_ids"], row["labels"]) == (ours.input_ids, ours.labels)
            assert (row["teacher_ids"], row["teacher_labels"]) == (theirs.input_ids, theirs.labels)
            assert row["sample_id"] == sample_id(ours.input_ids, ours.labels)
            assert row["teacher_sample_id"] == sample_id(theirs.input_ids, theirs.labels)
            last = max(i for i, label in enumerate(theirs.labels) if label == UNSCORED)
            assert row["teacher_start"] == last + 1
        assert (made.skipped, made.reasons, made.truncated) == (0, {}, 0)

    def test_prompts_alone_are_left_for_the_student(self) -> None:
        rows = chatted((ASKED,), ("Why?", "48.", "Really?"))
        made = prepared(rows, prompts_only=True)
        b = speaker("unigram", "llama3")
        for row, given in zip(made.dataset, rows, strict=True):
            assert set(row["labels"]) == set(row["teacher_labels"]) == {UNSCORED}
            text = b.tokenizer.apply_chat_template(given["messages"], add_generation_prompt=True, tokenize=False)
            assert row["teacher_ids"] == b.tokenizer.encode(text, add_special_tokens=False)
            assert row["teacher_start"] == len(row["teacher_ids"])

    def test_prompt_and_completion(self) -> None:
        made = prepared([{"prompt": "two plus two", "completion": " is four"}, {"prompt": "two pl", "completion": "us two"}])
        assert made.skipped == 0
        assert all(pair(row).count > 0 and pair(row).different == 0 for row in made.dataset)


class TestSplitConversations:
    """A template that leaves out earlier reasoning makes a row of each turn."""

    TALK = ("two?", "<think>2+2</think>four", "more?", "<think>4+2</think>six", "more?", "<think>6+2</think>eight")

    def thinker(self, name: str = "unigram") -> Reader:
        tokenizer = deepcopy(speaker(name, "chatml").tokenizer)
        tokenizer.chat_template = THINKING_TEMPLATE
        return Reader(tokenizer)

    def test_rows_of_both_sides_pair_up_one_by_one(self) -> None:
        a, b = Reader(tiny_tokenizer(chat_template=THINKING_TEMPLATE, eos_token="<|im_end|>")), self.thinker()
        made = prepared(chatted(self.TALK, ("two?", "four")), a, b)
        assert [answers(row, a) for row in made.dataset] == [
            f"<think>{n}+2</think>{said}<|im_end|>".encode() for n, said in ((2, "four"), (4, "six"), (6, "eight"))
        ] + [b"<think></think>four<|im_end|>"]
        for row in made.dataset:
            assert answers(row, b, of_teacher=True).replace(b" ", b"") == answers(row, a).replace(b" ", b"")
        assert made.skipped == 0

    @pytest.mark.parametrize("swapped", [False, True])
    def test_one_row_and_a_row_for_each_turn(self, swapped: bool) -> None:
        readers = speaker("byte-level", "chatml"), speaker("unigram", "gpt_oss")
        a, b = readers[::-1] if swapped else readers
        talk = ("two?", "It is four.", "more?", "It is six.", "more?", "It is eight.")
        made = prepared(chatted(("so?", "It is one."), talk), a, b)
        said = [b"It is one.", b"It is four.", b"It is six.", b"It is eight."]
        assert len(made.dataset) == 4 and (made.skipped, made.reasons) == (0, {})
        for row, text in zip(made.dataset, said, strict=True):
            assert text in answers(row, a) and text in answers(row, b, of_teacher=True)
            assert sum(other in answers(row, a) for other in said) == 1
            found = pair(row, a, b)
            assert found.different == 0 and found.count > 2
            assert row["sample_id"] == sample_id(row["input_ids"], row["labels"])
            assert row["teacher_sample_id"] == sample_id(row["teacher_ids"], row["teacher_labels"])

    def test_turns_that_one_side_cuts_off_are_left_out(self) -> None:
        a, b = Reader(tiny_tokenizer(chat_template=THINKING_TEMPLATE, eos_token="<|im_end|>")), self.thinker("bytes")
        last = rows_of(conversation(*self.TALK), b)[-1]
        made = prepared(chatted(self.TALK), a, b, max_length=first_scored(last.labels))
        assert (len(made.dataset), made.skipped) == (2, 0) and made.truncated > 0
        assert [b"four" in answers(row, b, of_teacher=True) for row in made.dataset] == [True, False]

    def test_the_last_turn_does_not_fit_on_the_teachers_side(self) -> None:
        talk, b = (ASKED, "48 clips.", LONG, "Yes."), speaker("bytes", "llama3")
        made = prepared(chatted(talk), b=b, max_length=last_span(rows_of(conversation(*talk), b)[0].labels)[0])
        (row,) = made.dataset
        assert b"Yes" in answers(row, speaker("byte-level", "chatml"))  # or the test shows nothing
        assert row["teacher_start"] == -1 and pair(row, b=b).count > 0


BAD_FOR_BOTH = {"messages": [{"role": "user", "content": ASKED}]}
BAD_FOR_TEACHER = {"messages": [{"role": "tool", "content": ASKED}, {"role": "assistant", "content": "48."}]}
UNREAD = chatted((ASKED, "48 😀."))[0]
GOOD = chatted((ASKED, "48 clips."))[0]


def strict_teacher() -> Reader:
    """It knows no bytes, and refuses tools."""
    tokenizer = deepcopy(speaker("unigram without bytes", "llama3").tokenizer)
    refuses = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    return Reader(tokenizer)


class TestBadRows:
    def test_each_is_counted_once_by_its_first_reason(self) -> None:
        a, b = speaker("tiny", "chatml"), strict_teacher()
        known = "She had seven apples and ate three. " * 4  # to the student's tokenizer
        too_long, long_for_teacher = chatted(("why? " * 99, "48."), (known, "48."))
        length = first_scored(rows_of(long_for_teacher["messages"], b)[0].labels)
        rows = [BAD_FOR_BOTH, GOOD, BAD_FOR_TEACHER, UNREAD, too_long, UNREAD, BAD_FOR_BOTH, long_for_teacher, GOOD]
        made = prepared(rows, a, b, skip_bad_rows=True, max_length=length)
        assert made.reasons == {
            "no assistant turn": 2,
            "the chat template fails on this conversation": 1,
            f"the prompt alone reaches max_length={length}": 2,
            "student and teacher read different texts": 2,
        }
        assert made.skipped == 7 and len(made.dataset) == 2

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([GOOD, UNREAD], r"^row 1: student and teacher read different texts; look for .*--skip_bad_rows true$"),
            ([GOOD, GOOD, BAD_FOR_TEACHER], r"^row 2: the chat template fails on this conversation; .*--skip_bad_rows true$"),
            ([BAD_FOR_BOTH], r"^row 0: no assistant turn; .*--skip_bad_rows true$"),
            ([{"prompt": "two?", "completion": ""}], r"^row 0: an empty completion; fill it in, .*--skip_bad_rows true$"),
        ],
    )
    def test_without_skipping_one_line_names_the_row(self, rows: list[dict[str, Any]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepared(rows, b=strict_teacher())

    def test_a_cut_before_the_first_common_end(self) -> None:
        a, b = speaker("byte-level", "chatml"), speaker("bytes", "llama3")
        words = ("How", "many", "clips", "half", "April", "did")
        word = next(w for w in words if len(a.text(a.tokenizer.encode(w, add_special_tokens=False)[:1])) > 1)
        row = {"messages": conversation("two?", word)}
        length = next(i for i, label in enumerate(rows_of(row["messages"], b)[0].labels) if label != UNSCORED) + 1
        rows = [row, {"messages": conversation("?", word)}]
        made = prepared(rows, a, b, max_length=length, skip_bad_rows=True)
        assert made.reasons == {"no token ends where one of the other side does": 1} and made.skipped == 1
        with pytest.raises(ValueError, match="row 0: no token ends where one of the other side does; raise max_length"):
            prepared(rows, a, b, max_length=length)

    def test_nothing_left(self) -> None:
        with pytest.raises(ValueError, match=r"no row can be aligned .2 x student and teacher read different texts"):
            prepared([UNREAD, UNREAD], b=strict_teacher(), skip_bad_rows=True)


class TestRefused:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"input_ids": [3, 4, 5]}], "rows of token ids have no text for the teacher's tokenizer: give `messages`"),
            ([{"text": "two", "teacher": "a"}], "columns teacher and teacher_prompt need teachers of the student's tokenizer"),
            ([{**GOOD, "teacher_prompt": "b"}], "columns teacher and teacher_prompt need teachers of the student's tokenizer"),
        ],
    )
    def test_columns(self, rows: list[dict[str, Any]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            prepared(rows)

    @pytest.mark.parametrize("name", ["wordpiece", "wordpiece of BERT"])
    def test_tokens_without_spaces(self, name: str) -> None:
        with pytest.raises(ValueError, match=r"the student's tokenizer is not lossless: it reads 'a b' as .*use a model with"):
            prepared([GOOD], Reader(family(name)))
        with pytest.raises(ValueError, match="the teacher's tokenizer is not lossless"):
            prepared([GOOD], b=Reader(family(name)))


class TestCache:
    def test_the_same_rows_are_aligned_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, [GOOD, *chatted((ASKED, "none"), ("so?", "so"))])))
        first = prepared(load_rows(str(path)))
        monkeypatch.setattr(prepare, "aligned", None)  # nothing is aligned again
        again = prepared(load_rows(str(path)))
        assert list(first.dataset) == list(again.dataset) and len(again.dataset) == 3
        with pytest.raises(TypeError):
            prepared(load_rows(str(path)), b=speaker("bytes", "llama3"))

    def test_several_processes(self) -> None:
        rows = [GOOD, *chatted((ASKED, "none"), ("so?", "so", "and?", "no"), ("why?", "she did"))]
        assert list(prepared(rows, num_proc=2).dataset) == list(prepared(rows).dataset)

"""Chunks of a pair of rows, against all ranges of their tokens."""

from __future__ import annotations

import re
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.data.aligned import Aligned, Reader, TextRow, aligned
from kdlib.data.draft import UNSCORED, TokenRow, scored_row
from tests.data.aligned_cases import (
    TEMPLATES,
    Expected,
    brute_force,
    chunks_of,
    conversation,
    rows_of,
    speaker,
    text_row,
    turns_of,
)
from tests.tokenizers.families import CHANGING, LOSSLESS, family

ANSWERS = ("She sold 48/2 = 24 clips.", "48 + 24 = 72, so 72 in all: café 東京 👩‍👧‍👦.")
TALK = conversation("How many did she sell?", ANSWERS[0], "And\nin all?", ANSWERS[1])
TRAINED = ("byte-level", "digits", "bytes", "unigram", "llama2")
LAYOUTS = ("chatml", "llama3", "mistral", "gemma", "plain")


def found_and_expected(
    a: Reader, b: Reader, *, talk: list = TALK, answers: tuple[str, ...] = ANSWERS
) -> tuple[Expected, Expected]:
    ours, theirs = (text_row(rows_of(talk, reader)[0], reader) for reader in (a, b))
    found = aligned(ours, theirs)
    assert found.different == 0
    return chunks_of(found), brute_force(ours, theirs, answers)


class TestConversations:
    @pytest.mark.parametrize(("first", "second"), [*product(TRAINED, TRAINED)])
    def test_two_tokenizers_and_templates(self, first: str, second: str) -> None:
        found, expected = found_and_expected(speaker(first, "chatml"), speaker(second, "llama3"))
        assert found == expected and len(found) > 4

    @pytest.mark.parametrize(("first", "second"), [*product(LAYOUTS, LAYOUTS)])
    def test_two_layouts(self, first: str, second: str) -> None:
        spaced = {first, second} <= {"mistral", "plain"}  # both templates put a space before an answer
        answers = tuple(f" {answer}" for answer in ANSWERS) if spaced else ANSWERS
        found, expected = found_and_expected(speaker("byte-level", first), speaker("unigram", second), answers=answers)
        if first == second:  # rows of one text, which is compared as a whole: the end of a turn is text too
            expected += [chunk for chunk in found if chunk not in expected]
        assert sorted(found) == sorted(expected) and len(found) > 4

    def test_the_end_of_a_turn_is_a_chunk(self) -> None:
        a, b = speaker("byte-level", "chatml"), speaker("unigram", "llama3")
        ours, theirs = (rows_of(TALK, reader)[0] for reader in (a, b))
        found = aligned(text_row(ours, a), text_row(theirs, b))
        ends = [
            [i for i, label in enumerate(row.labels) if label == reader.tokenizer.eos_token_id]
            for row, reader in ((ours, a), (theirs, b))
        ]
        assert len(ends[0]) == len(ends[1]) == 2
        assert found.student[ends[0]].tolist() == found.teacher[ends[1]].tolist() and (found.student[ends[0]] >= 0).all()

    def test_white_space_around_a_turn(self) -> None:
        talk = conversation("two?", " \n four of them\n", "why?", "so")
        for first, second in product(("chatml", "gemma"), ("mistral", "llama3")):
            found, expected = found_and_expected(
                speaker("byte-level", first), speaker("bytes", second), talk=talk, answers=("four of them", "so")
            )
            inside = [chunk for chunk in found if chunk in expected]
            assert inside == expected and len(expected) >= 4

    @pytest.mark.parametrize("cut", range(1, 12))
    @pytest.mark.parametrize("side", [0, 1])
    def test_a_cut_on_one_side(self, cut: int, side: int) -> None:
        readers = speaker("byte-level", "chatml"), speaker("unigram", "llama3")
        rows = [rows_of(TALK, reader)[0] for reader in readers]
        whole = chunks_of(aligned(*(text_row(row, reader) for row, reader in zip(rows, readers, strict=True))))
        lengths = [len(row.input_ids) for row in rows]
        lengths[side] = max(2, lengths[side] - 5 * cut)
        cuts = [text_row(row, reader, length=n) for row, reader, n in zip(rows, readers, lengths, strict=True)]
        found = aligned(*cuts)
        assert chunks_of(found) == [chunk for chunk in whole if max(chunk[side]) < lengths[side]]
        assert found.different == 0

    def test_another_text_has_no_chunk(self) -> None:
        a, b = speaker("byte-level", "chatml"), speaker("unigram", "llama3")
        ours = rows_of(conversation("two?", "It is four.", "why?", "So it is."), a)[0]
        theirs = rows_of(conversation("two?", "It was four.", "why?", "So it is."), b)[0]
        found = aligned(text_row(ours, a), text_row(theirs, b))
        assert found.different == 1
        assert b"".join(a.text([ours.input_ids[i] for i in ids]) for ids, _ in chunks_of(found)) == b"So it is.<|im_end|>"

    def test_a_block_without_reasoning_and_a_channel(self) -> None:
        plain = speaker("byte-level", "llama3")
        for template in ("qwen3", "gpt_oss"):
            other = speaker("unigram", template)
            rows = [text_row(rows_of(TALK[:2], reader)[-1], reader) for reader in (plain, other)]
            for pair in (rows, rows[::-1]):
                found = aligned(*pair)
                assert found.different == 0 and chunks_of(found) == brute_force(*pair, ANSWERS[:1])
            found = aligned(*rows)
            assert found.answer is not None
            before = other.text(rows[1].input_ids[: found.answer])
            assert before.rstrip().endswith((b"</think>", b"final<|message|>"))

    def test_a_closing_that_is_text_is_no_closing(self) -> None:
        found, expected = found_and_expected(speaker("bytes", "unclosed"), speaker("bytes", "llama3"))
        assert found == expected

    @pytest.mark.parametrize("text", ["a literal <|eot|> within", "<|im_end|><|im_end|>", "it ends</s>", "<unk> ▁ <0x41>"])
    def test_special_tokens_in_the_text(self, text: str) -> None:
        talk = conversation("two?", text, "why?", "so")
        for names in product(TRAINED, TRAINED):
            readers = speaker(names[0], "chatml"), speaker(names[1], "llama3")
            check(*(text_row(rows_of(talk, reader)[0], reader) for reader in readers))

    def test_reasoning_on_one_side_is_another_text(self) -> None:
        a, b = speaker("byte-level", "llama3"), speaker("unigram", "chatml")
        ours, theirs = rows_of(conversation("two?", "4"), a)[0], rows_of(conversation("two?", "<think>2+2</think>4"), b)[0]
        found = aligned(text_row(ours, a), text_row(theirs, b))
        assert (found.count, found.different) == (0, 1)


def plain_row(text: str, reader: Reader, *, begin: int | None = None, prompt: str | None = None) -> TextRow:
    """A row of a text as data prepares them: scored behind ``prompt``, with a token that is across it."""
    ids = reader.tokenizer.encode(text, add_special_tokens=False)
    before = reader.tokenizer.encode(prompt, add_special_tokens=False) if prompt is not None else []
    start = next((i for i, pair in enumerate(zip(ids, before, strict=False)) if pair[0] != pair[1]), min(len(ids), len(before)))
    head = [] if begin is None else [begin]
    row = scored_row([*head, *ids, reader.tokenizer.eos_token_id], [(start + len(head), len(ids) + len(head) + 1)])
    return text_row(row, reader)


def encoded(reader: Reader, text: str) -> list[int]:
    return reader.tokenizer.encode(text, add_special_tokens=False)


class TestTexts:
    def test_the_first_token_without_a_beginning_of_text_has_no_chunk(self) -> None:
        a, b = speaker("byte-level", "llama3"), speaker("bytes", "chatml")
        ours, theirs = (
            plain_row("sold half", a, begin=a.tokenizer.convert_tokens_to_ids("<|begin|>")),
            plain_row("sold half", b),
        )
        found = aligned(ours, theirs)
        first = len(a.text(ours.input_ids[1:2]))
        assert found.student[:2].tolist() == [-1, -1] and found.teacher[:first].tolist() == [-1] * first
        assert found.teacher[first] == found.student[2] == 0 and found.count == len(ours.input_ids) - 2

    @pytest.mark.parametrize(("n", "m"), [(9, 9), (9, 4), (4, 9)])
    def test_a_text_that_repeats_itself_is_not_shifted(self, n: int, m: int) -> None:
        a, b = speaker("byte-level", "llama3"), speaker("bytes", "chatml")
        ours = plain_row(" a" * n, a, begin=a.tokenizer.convert_tokens_to_ids("<|begin|>"))
        theirs = plain_row(" a" * m, b)
        ours, theirs = (text_row(cut(row), row.reader) for row in (ours, theirs))
        check(ours, theirs, same_start=True)
        assert aligned(ours, theirs).count > 0

    @pytest.mark.parametrize("names", [*product(TRAINED, TRAINED)])
    def test_a_prompt_that_ends_within_a_token(self, names: tuple[str, str]) -> None:
        for prompt, completion in (("the sq", "uare metres"), ("a", "aaaaaaa"), ("x" * 3, "x" * 9), ("", "sold half")):
            rows = [plain_row(prompt + completion, speaker(name, "chatml"), prompt=prompt) for name in names]
            check(*rows, same_start=True)
            assert aligned(*rows).count > 0 and aligned(*rows).different == 0

    def test_a_repeating_answer_whose_first_token_begins_in_the_prompt(self) -> None:
        """Behind prompts that differ nothing says where in "lllll" the answer of one side starts."""
        a, b = speaker("byte-level", "chatml"), speaker("bytes", "chatml")
        twice = next(i for i, piece in enumerate(a.pieces) if len(piece) == 2 and piece[:1] == piece[1:] and piece.isalnum())
        once, its = (reader.pieces.index(a.pieces[twice][:1]) for reader in (a, b))
        ours, theirs = [*encoded(a, "x"), twice, once], [*encoded(b, "y"), *[its] * 5]
        rows = [text_row(scored_row(ids, [(1, len(ids))]), reader) for ids, reader in ((ours, a), (theirs, b))]
        assert (aligned(*rows).count, aligned(*rows).different) == (0, 1)
        same = text_row(scored_row([*encoded(b, "x"), *[its] * 5], [(1, 6)]), b)  # one prompt says it
        assert (aligned(rows[0], same).count, aligned(rows[0], same).different) == (2, 0)

    def test_a_space_before_the_text(self) -> None:
        a, b = speaker("llama2", "chatml"), speaker("byte-level", "chatml")
        rows = [plain_row("sold half as many", reader, begin=reader.tokenizer.eos_token_id) for reader in (a, b)]
        found = aligned(*rows)
        assert a.text(rows[0].input_ids[1:])[:1] == b" "  # or the test shows nothing
        texts = [a.text([rows[0].input_ids[i] for i in ids]) for ids, _ in chunks_of(found)]
        assert b"".join(texts) == b" half as many<|im_end|>"

    def test_a_text_that_is_a_rendered_conversation(self) -> None:
        text = "<|im_start|>user\ntwo?<|im_end|>\n<|im_start|>assistant\nfour<|im_end|>"
        rows = plain_row(text, speaker("byte-level", "chatml")), plain_row(text, speaker("bytes", "plain"))
        found = check(*rows)
        assert found.count > 10
        for chunk in chunks_of(found):
            before = [row.reader.text(row.input_ids[: ids[0]]) for row, ids in zip(rows, chunk, strict=True)]
            assert before[0] == before[1]

    @pytest.mark.parametrize("name", sorted(CHANGING))
    def test_a_tokenizer_that_changes_the_text(self, name: str) -> None:
        for text in ("sold ½ of ﬁve Cafe\u0301s 東京 for a  b\u3000c", "😀😀 and 😀", "SOLD sold", "  a a a"):
            for a, b in product((name, "bytes", "unigram without bytes"), (name, "bytes", "llama2 without bytes")):
                readers = Reader(family(a)), speaker(b, "chatml")
                if readers[0].tokenizer.eos_token_id is not None:
                    check(*(plain_row(text, reader) for reader in readers))

    def test_unknown_tokens_are_in_no_chunk(self) -> None:
        readers = speaker("unigram without bytes", "chatml"), speaker("unigram without bytes", "llama3")
        rows = [plain_row("sold 😀 half", reader) for reader in readers]
        found = aligned(*rows)
        unknown = [i for i, index in enumerate(rows[0].input_ids) if index in readers[0].unknown]
        assert unknown and (found.student[unknown] == -1).all() and found.count > 0

    def test_ids_beyond_the_tokenizer_spell_nothing(self) -> None:
        a, b = speaker("byte-level", "chatml"), speaker("bytes", "chatml")
        ours, theirs = plain_row("sold half", a), plain_row("sold half", b)
        ids = [*ours.input_ids[:3], len(a.pieces) + 7, *ours.input_ids[3:]]
        odd = TextRow(input_ids=ids, labels=[UNSCORED, *ids[1:]], reader=a)
        assert a.text(ids).count(b"\xff") == 1
        found = aligned(odd, theirs)
        assert [a.text([ids[i] for i in mine]) for mine, _ in chunks_of(found)] == [b"old", b" half"]  # and no end


def cut(row: TextRow) -> TokenRow:
    return TokenRow(input_ids=list(row.input_ids[:-1]), labels=list(row.labels[:-1]))


def check(ours: TextRow, theirs: TextRow, *, same_start: bool = False) -> Aligned:
    """Every chunk is the same bytes on both sides, or closes a turn; chunks are in order, without gaps in them, all scored."""
    found = aligned(ours, theirs)
    for row, ids in ((ours, found.student), (theirs, found.teacher)):
        placed = ids[ids >= 0]
        assert (np.diff(placed) >= 0).all() and np.unique(placed).tolist() == list(range(found.count))
        assert all(row.labels[i] != UNSCORED and i > 0 for i in np.flatnonzero(ids >= 0))
        assert all((np.diff(np.flatnonzero(ids == n)) == 1).all() for n in range(found.count))
    for mine, its in chunks_of(found):
        texts = [row.reader.text([row.input_ids[i] for i in ids]) for row, ids in ((ours, mine), (theirs, its))]
        if not (ours.input_ids[mine[0]] in ours.reader.special and theirs.input_ids[its[0]] in theirs.reader.special):
            assert texts[0] == texts[1]
        if same_start:
            before = [text_before(row, ids[0]) for row, ids in ((ours, mine), (theirs, its))]
            assert before[0] == before[1]
    return found


def text_before(row: TextRow, place: int) -> bytes:
    """What stands before a token, without a beginning of text and the space before a text."""
    begun = row.input_ids[0] in row.reader.special and row.input_ids[1] not in row.reader.special
    return row.reader.text(row.input_ids[int(begun) : place]).lstrip()


OPENING = re.compile(rb"\A\s*(<think>\s*</think>|<\|channel\|>\s*final\s*<\|message\|>)?\s*")


def check_places(ours: TextRow, theirs: TextRow) -> None:
    """A chunk has the same text of its turn before it on both sides, apart from what a template opens the answer with."""
    turns = [dict(enumerate(turns_of(row))) for row in (ours, theirs)]
    for chunk in chunks_of(aligned(ours, theirs)):
        (n, before), (m, its) = (
            next(
                (number, row.reader.text([row.input_ids[i] for i in turn if i < ids[0]]))
                for number, turn in of_side.items()
                if ids[0] in turn
            )
            for row, of_side, ids in zip((ours, theirs), turns, chunk, strict=True)
        )
        assert n == m and OPENING.sub(b"", before, count=1) == OPENING.sub(b"", its, count=1)


NO_SPACES = {name for name in LOSSLESS | CHANGING if "wordpiece" in name}
NAMES = sorted((LOSSLESS.keys() | CHANGING.keys()) - NO_SPACES - {"sentencepiece32k", "tekken"})
ODD = [
    "a",
    " a",
    "aaaa",
    " ",
    "\n\n",
    "<|im_end|>",
    "<|eot|>",
    "</s>",
    "▁",
    "<0x41>",
    "é",
    "e\u0301",
    "sold 48 clips",
    "<think>",
]
PARTS = st.text(min_size=1, max_size=12) | st.sampled_from(ODD)
CONTENTS = st.lists(PARTS, min_size=1, max_size=4).map("".join).filter(lambda text: text.strip())


@settings(max_examples=100, deadline=None)
@given(
    contents=st.lists(CONTENTS, min_size=2, max_size=4).map(lambda found: found[: len(found) // 2 * 2]),
    names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    layouts=st.tuples(st.sampled_from(sorted(TEMPLATES)), st.sampled_from(sorted(TEMPLATES))),
    lengths=st.tuples(st.integers(2, 200), st.integers(2, 200)),
)
def test_any_conversation(
    contents: list[str], names: tuple[str, str], layouts: tuple[str, str], lengths: tuple[int, int]
) -> None:
    readers = [speaker(name, layout) for name, layout in zip(names, layouts, strict=True)]
    rows = [
        text_row(rows_of(conversation(*contents), reader)[-1], reader, length=length)
        for reader, length in zip(readers, lengths, strict=True)
    ]
    check(*rows)
    check_places(*rows)


@settings(max_examples=100, deadline=None)
@given(
    texts=st.tuples(st.text(max_size=8) | PARTS, CONTENTS),
    names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
    lengths=st.tuples(st.integers(2, 60), st.integers(2, 60)),
)
def test_any_text_behind_any_prompt(texts: tuple[str, str], names: tuple[str, str], lengths: tuple[int, int]) -> None:
    rows = []
    for name, length in zip(names, lengths, strict=True):
        row = plain_row("".join(texts), speaker(name, "chatml"), prompt=texts[0])
        rows.append(TextRow(input_ids=row.input_ids[:length], labels=row.labels[:length], reader=row.reader))
    check(*rows)

"""The alignment of two tokenisations, against definitions that know no offsets."""

from __future__ import annotations

from functools import cache
from itertools import combinations_with_replacement

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.tokenizers.alignment import align, chunk_ids, chunks, end_to_end
from kdlib.tokenizers.spans import LossyTokenizationError, byte_spans
from tests.tokenizers.families import LOSSLESS, TEXTS, family, real_texts

Pieces = list[bytes]
Chunks = list[tuple[int, int, int, int]]
PAIRS = list(combinations_with_replacement(LOSSLESS, 2))


def finest(a: Pieces, b: Pieces) -> Chunks:
    """By trying all: the most chunks, each of equal bytes on both sides and of some, that reach as far as any do."""

    @cache
    def best(i: int, j: int) -> tuple[int, Chunks]:
        found: tuple[int, Chunks] = (i, [])
        for i1 in range(i + 1, len(a) + 1):
            for j1 in range(j + 1, len(b) + 1):
                if sum(map(len, a[i:i1])) == sum(map(len, b[j:j1])) > 0 and b"".join(a[i:i1]) == b"".join(b[j:j1]):
                    reach, rest = best(i1, j1)
                    found = max(found, (reach, [(i, i1, j, j1), *rest]), key=lambda option: (option[0], len(option[1])))
        return found

    return best(0, 0)[1]


def with_empty(found: Chunks, a: Pieces, b: Pieces) -> Chunks:
    """Chunks of the tokens that have bytes, in the numbers of all: an empty token joins the next chunk, at the end the last."""
    sides = [[i for i, piece in enumerate(pieces) if piece] for pieces in (a, b)]
    ends = [[sides[0][a1 - 1] + 1, sides[1][b1 - 1] + 1] for _, a1, _, b1 in found]
    for side, pieces in enumerate((a, b)):
        if found and not any(pieces[ends[-1][side] :]):
            ends[-1][side] = len(pieces)
    return [(a0, a1, b0, b1) for (a0, b0), (a1, b1) in zip([[0, 0], *ends], ends, strict=False)]


def by_strings(a: Pieces, b: Pieces) -> Chunks:
    """Both sides read token by token into two strings: where they are equal, a chunk ends. For long texts."""
    found, i, j, i0, j0, left, right = [], 0, 0, 0, 0, b"", b""
    while i < len(a) or j < len(b):
        if len(left) <= len(right) and i < len(a):
            left, i = left + a[i], i + 1
        elif j < len(b):
            right, j = right + b[j], j + 1
        else:
            break
        if left == right and left:
            found.append((i0, i, j0, j))
            i0, j0, left, right = i, j, b"", b""
    return found


@st.composite
def segmentations(draw: st.DrawFn) -> tuple[Pieces, Pieces]:
    """One text of few different bytes, cut at random on two sides; tokens without bytes, and sides cut short."""
    text = bytes(draw(st.lists(st.sampled_from(b"ab"), max_size=9)))
    sides = []
    for _ in range(2):
        cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=7)))
        pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        sides.append(pieces[: draw(st.integers(0, len(pieces)))] if draw(st.booleans()) else pieces)
    return sides[0], sides[1]


@given(sides=segmentations())
@settings(deadline=None, max_examples=400)
def test_random_segmentations_against_exhaustive_search(sides: tuple[Pieces, Pieces]) -> None:
    a, b = sides
    expected = with_empty(finest([p for p in a if p], [p for p in b if p]), a, b)
    spans = [end_to_end([len(piece) for piece in side]) for side in sides]
    assert align(*spans) == expected
    assert align(*(side.tolist() for side in spans)) == expected
    if all(a) and all(b):
        assert by_strings(a, b) == expected


def pieces_of(name: str, text: str) -> tuple[np.ndarray, Pieces]:
    """A text's spans and what is written in each, with the spaces before it where the tokenizer leaves them out."""
    spans, source = byte_spans(family(name), text)[1], text.encode()
    before = [0, *spans[:-1, 1].tolist()]
    return spans, [source[begin:end] for begin, end in zip(before, spans[:, 1].tolist(), strict=False)]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_tokenizers_against_exhaustive_search(first: str, second: str) -> None:
    compared = 0
    for text in ("the 48 clips,\n sold", " é👩‍👧 e\u0301x", "東京 1234.50\t%", *(text[:24] for text in TEXTS)):
        try:
            (spans_a, a), (spans_b, b) = pieces_of(first, text), pieces_of(second, text)
        except LossyTokenizationError:
            continue
        expected = with_empty(finest([p for p in a if p], [p for p in b if p]), a, b)
        assert align(spans_a, spans_b) == expected
        compared += 1
    assert compared >= 6


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_tokenizers_on_real_text(first: str, second: str) -> None:
    for text in real_texts(12):
        try:
            (spans_a, a), (spans_b, b) = pieces_of(first, text), pieces_of(second, text)
        except LossyTokenizationError:
            assert "wordpiece" in (first, second)  # characters that it has no token for
            continue
        found = align(spans_a, spans_b)
        assert found == with_empty(by_strings([p for p in a if p], [p for p in b if p]), a, b)
        assert found[-1][1::2] == (len(a), len(b))


def test_a_tokenizer_with_itself_has_a_chunk_for_each_token() -> None:
    spans = byte_spans(family("byte-level"), TEXTS[0])[1]
    assert align(spans, spans) == [(i, i + 1, i, i + 1) for i in range(len(spans))]


def test_no_tokens_no_chunks() -> None:
    for a, b in (([], []), ([(0, 1)], []), ([(0, 0)], [(0, 2)]), ([(0, 3)], [(0, 2)]), ([(0, 0)], [(0, 0)])):
        assert align(a, b) == align(b, a) == []
        assert chunks(a, b).shape == (0, 4)
    assert chunk_ids(chunks([], []), side=0, length=3).tolist() == [-1, -1, -1]


def test_spans_may_begin_anywhere() -> None:
    a, b = end_to_end([2, 3, 1]), end_to_end([1, 1, 4])
    expected = align(a, b)
    assert expected == [(0, 1, 0, 2), (1, 3, 2, 3)]
    for shift in (-4, 10**12):
        assert align(a + shift, b + shift) == expected


@given(sides=segmentations())
@settings(deadline=None, max_examples=100)
def test_the_chunk_of_each_token(sides: tuple[Pieces, Pieces]) -> None:
    found = chunks(*(end_to_end([len(piece) for piece in side]) for side in sides))
    for side, pieces in enumerate(sides):
        expected = [-1] * len(pieces)
        for number, chunk in enumerate(found.tolist()):
            expected[chunk[2 * side] : chunk[2 * side + 1]] = [number] * (chunk[2 * side + 1] - chunk[2 * side])
        assert chunk_ids(found, side=side, length=len(pieces)).tolist() == expected
        kept = chunk_ids(found[1::2], side=side, length=len(pieces))  # chunks may be left out
        assert kept.tolist() == [number // 2 if number % 2 else -1 for number in expected]


def test_texts_laid_end_to_end_are_aligned_as_each_is() -> None:
    texts = [text for text in TEXTS if text]
    sides = [[byte_spans(family(name), text)[1] for text in texts] for name in ("byte-level", "bytes")]
    apart = [chunks(a, b)[:, 1::2] - chunks(a, b)[:, ::2] for a, b in zip(*sides, strict=True)]
    together = chunks(*(end_to_end(np.concatenate([spans[:, 1] - spans[:, 0] for spans in side])) for side in sides))
    assert np.array_equal(together[:, 1::2] - together[:, ::2], np.concatenate(apart))

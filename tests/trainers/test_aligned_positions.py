"""Positions of rows that two models read in tokens of their own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from kdlib.data.aligned import AlignedCollator, prepare_aligned
from kdlib.data.draft import UNSCORED
from kdlib.trainers.aligned_positions import aligned_positions, without_sequences
from kdlib.types import Positions
from tests.data.aligned_cases import conversation, speaker

TALKS = [("two?", "four, so"), ("How many?", "She sold 24 clips."), ("so?", "so", "in all?", "72 in all"), ("?", "No.")]


@pytest.fixture(scope="module")
def batch() -> dict[str, Any]:
    a, b = speaker("byte-level", "chatml"), speaker("unigram", "llama3")
    rows = Dataset.from_list([{"messages": conversation(*talk)} for talk in TALKS])
    made = prepare_aligned(rows, a, b, max_length=200).dataset
    return AlignedCollator(student=a, teacher=b, closing=b.tokenizer.eos_token_id)(list(made))


def plain(side: dict[str, Tensor], first: list[int], skipped: set[int]) -> list[tuple[int, int, int, int, int]]:
    """(place in the flattened batch, token there, token that follows, row, chunk) of each scored token, by hand."""
    found = []
    width = side["input_ids"].shape[1]
    for row in range(len(side["input_ids"])):
        for place in range(1, width):
            label, chunk = side["labels"][row, place].item(), side["chunk"][row, place].item()
            if label != UNSCORED and row not in skipped:
                before = side["input_ids"][row, place - 1].item()
                found.append((row * width + place - 1, before, label, row, chunk + first[row] if chunk >= 0 else -1))
    return found


def as_rows(positions: Positions) -> list[tuple[int, ...]]:
    assert positions.tokens is not None and positions.chunk is not None
    parts = (positions.index, positions.tokens, positions.labels, positions.sequence, positions.chunk)
    return list(zip(*(part.tolist() for part in parts), strict=True))


def check(positions: Positions) -> None:
    """Chunks have rows on both sides, which follow one another, and no number is left out."""
    other = positions.other
    assert other is not None and other.chunks == positions.chunks
    for side in (positions, other):
        assert side.chunk is not None
        placed = side.chunk[side.chunk >= 0]
        assert torch.equal(placed, placed.sort().values) and placed.unique().tolist() == list(range(positions.chunks))
        places = [(side.chunk == n).nonzero()[:, 0] for n in range(positions.chunks)]
        assert all((rows.diff() == 1).all() and len(side.sequence[rows].unique()) == 1 for rows in places)


def numbered(batch: dict[str, Any], skipped: set[int] = frozenset()) -> tuple[list[int], int]:
    """The first chunk of each row, and the number of all."""
    counts = [0 if row in skipped else len({n for n in line if n >= 0}) for row, line in enumerate(batch["chunk"].tolist())]
    return [sum(counts[:row]) for row in range(len(counts))], sum(counts)


def test_chunks_are_numbered_through_the_batch(batch: dict[str, Any]) -> None:
    found = aligned_positions(batch)
    first, total = numbered(batch)
    assert found.other is not None and found.chunks == total > len(TALKS)
    assert as_rows(found) == plain(batch, first, set()) and as_rows(found.other) == plain(batch["other"], first, set())
    check(found)


@pytest.mark.parametrize("blank", [{0}, {1, 3}, {0, 1, 2, 3}])
def test_rows_that_fill_a_batch_are_scored_on_neither_side(batch: dict[str, Any], blank: set[int]) -> None:
    labels = batch["labels"].clone()
    labels[list(blank)] = UNSCORED
    found = aligned_positions({**batch, "labels": labels})
    first, total = numbered(batch, blank)
    assert found.other is not None and found.chunks == total
    assert as_rows(found) == plain(batch, first, blank) and as_rows(found.other) == plain(batch["other"], first, blank)
    check(found)


@pytest.mark.parametrize("bad", [[0], [1], [3], [0, 2], [0, 1, 2, 3], []])
def test_without_some_sequences(batch: dict[str, Any], bad: list[int]) -> None:
    whole = aligned_positions(batch)
    left = without_sequences(whole, torch.tensor(bad, dtype=torch.long))
    first, total = numbered(batch, set(bad))
    assert left.other is not None and left.chunks == total
    assert as_rows(left) == plain(batch, first, set(bad)) and as_rows(left.other) == plain(batch["other"], first, set(bad))
    check(left)


def test_a_row_without_chunks_keeps_its_scored_tokens(batch: dict[str, Any]) -> None:
    chunk, other = batch["chunk"].clone(), batch["other"]["chunk"].clone()
    chunk[1], other[1] = -1, -1
    found = aligned_positions({**batch, "chunk": chunk, "other": {**batch["other"], "chunk": other}})
    assert (found.sequence == 1).any() and found.chunk is not None
    assert (found.chunk[found.sequence == 1] == -1).all()
    check(found)

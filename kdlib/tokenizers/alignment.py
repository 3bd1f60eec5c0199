"""Two tokenisations of one text, cut where tokens of both end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Chunk = tuple[int, int, int, int]
Ints = NDArray[np.int64]


def align(spans_a: ArrayLike, spans_b: ArrayLike) -> list[Chunk]:
    """(a0, a1, b0, b1) of each minimal chunk: the half-open ranges of tokens that spell the same bytes in both, in order.

    ``spans`` [n, 2]: first byte and the byte after the last of each token, in one text, left to right. Chunks end at the bytes
    where tokens of both sides end, so that each has bytes and none can be cut further; those without a common end behind them
    (a side that was truncated) are left out. A token without bytes belongs to the chunk that follows it, at the end to the
    last.
    """
    return [tuple(chunk) for chunk in chunks(spans_a, spans_b).tolist()]


def chunks(spans_a: ArrayLike, spans_b: ArrayLike) -> Ints:
    """``align`` as an array [C, 4]."""
    a, b = (np.asarray(spans, np.int64).reshape(-1, 2) for spans in (spans_a, spans_b))
    last_a, last_b = (np.flatnonzero(spans[:, 1] > spans[:, 0]) for spans in (a, b))  # tokens with bytes
    last_a, last_b = _common(last_a, last_b, ends_a=a[:, 1], ends_b=b[:, 1])
    found = np.zeros((len(last_a), 4), np.int64)
    for column, last, spans in ((0, last_a, a), (2, last_b, b)):
        found[:, column + 1] = last + 1
        found[1:, column] = last[:-1] + 1
        if len(last) and spans[last[-1], 1] == spans[-1, 1]:
            found[-1, column + 1] = len(spans)  # only tokens without bytes are left
    return found


def chunk_ids(found: Ints, *, side: int, length: int) -> Ints:
    """[length]: the number of each token's chunk, -1 for tokens of none; side 0 is that of ``spans_a``, 1 of ``spans_b``."""
    first = found[:, 2 * side]
    counts = found[:, 2 * side + 1] - first
    number = np.repeat(np.arange(len(found)), counts)
    ids = np.full(length, -1, np.int64)
    ids[np.arange(len(number)) + (first - counts.cumsum() + counts)[number]] = number
    return ids


def end_to_end(lengths: Sequence[int] | Ints) -> Ints:
    """Spans [n, 2] of tokens of these lengths in bytes that stand end to end."""
    sizes = np.asarray(lengths, np.int64)
    spans = np.empty((len(sizes), 2), np.int64)
    np.cumsum(sizes, out=spans[:, 1])
    np.subtract(spans[:, 1], sizes, out=spans[:, 0])
    return spans


def _common(full_a: Ints, full_b: Ints, *, ends_a: Ints, ends_b: Ints) -> tuple[Ints, Ints]:
    """Of the tokens with bytes, those of both sides that end at the same byte, in order."""
    at_a, at_b = ends_a[full_a], ends_b[full_b]
    if not len(at_a) or not len(at_b):
        return full_a[:0], full_b[:0]
    first = min(at_a[0], at_b[0])
    at_a, at_b = at_a - first, at_b - first
    is_end = np.zeros((2, max(at_a[-1], at_b[-1]) + 1), np.bool_)  # a byte each: the text is not much longer than its tokens
    is_end[0, at_a] = is_end[1, at_b] = True
    return full_a[is_end[1, at_a]], full_b[is_end[0, at_b]]

"""Two tokenisations of one text, cut where tokens of both end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Chunk = tuple[int, int, int, int]


def align(spans_a: ArrayLike, spans_b: ArrayLike) -> list[Chunk]:
    """(a0, a1, b0, b1) of each minimal chunk: the half-open ranges of tokens that spell the same bytes in both, in order.

    ``spans`` [n, 2]: first byte and the byte after the last of each token, in one text, left to right. Chunks end at the bytes
    where tokens of both sides end, so that each has bytes and none can be cut further; those without a common end behind them
    (a side that was truncated) are left out. A token without bytes belongs to the chunk that follows it, at the end to the last.
    """
    return [tuple(chunk) for chunk in chunks(spans_a, spans_b).tolist()]


def chunks(spans_a: ArrayLike, spans_b: ArrayLike) -> NDArray[np.int64]:
    """``align`` as an array [C, 4]."""
    a, b = (np.asarray(spans, np.int64).reshape(-1, 2) for spans in (spans_a, spans_b))
    a_ends, a_after = _ends(a)
    b_ends, b_after = _ends(b)
    _, in_a, in_b = np.intersect1d(a_ends, b_ends, assume_unique=True, return_indices=True)
    found = np.zeros((len(in_a), 4), np.int64)
    for column, after, index, spans in ((0, a_after, in_a, a), (2, b_after, in_b, b)):
        found[:, column + 1] = after[index]
        if len(index) and (spans[after[index[-1]] :, 1] == spans[after[index[-1]] - 1, 1]).all():
            found[-1, column + 1] = len(spans)  # only tokens without bytes are left
        found[1:, column] = found[:-1, column + 1]
    return found


def chunk_ids(found: NDArray[np.int64], *, side: int, length: int) -> NDArray[np.int64]:
    """[length]: the number of each token's chunk, -1 for tokens of none; ``side`` 0 is that of ``spans_a``, 1 of ``spans_b``."""
    ids = np.full(length, -1, np.int64)
    if len(found):
        counts = found[:, 2 * side + 1] - found[:, 2 * side]
        ids[: counts.sum()] = np.repeat(np.arange(len(found)), counts)
    return ids


def _ends(spans: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ends of tokens with bytes, increasing, and how many tokens there are up to each."""
    full = np.flatnonzero(spans[:, 1] > spans[:, 0])
    return spans[full, 1], full + 1


def end_to_end(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Spans [n, 2] of tokens of these lengths in bytes that stand end to end."""
    ends = np.cumsum(np.asarray(lengths, np.int64))
    return np.stack([ends - np.asarray(lengths, np.int64), ends], 1)

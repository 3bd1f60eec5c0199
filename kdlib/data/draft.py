"""The small vocabulary the row kinds share: a token row, a row still to be tokenised, a row that cannot be
used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

UNSCORED = -100

Encoded = Mapping[str, list[int]]  # text -> token ids


class BadRowError(ValueError):
    """A row that teaches nothing: ``reason`` groups it with its like, ``fix`` says what its owner can do."""

    def __init__(self, reason: str, *, fix: str) -> None:
        super().__init__(f"{reason}; {fix}")
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """Token ids and as many labels, unshifted: the token's own id where it is scored, else -100.

    ``teacher_prompt_ids``: what the teacher reads in place of the tokens before the first scored one; None: these.
    """

    input_ids: list[int]
    labels: list[int]
    teacher_prompt_ids: list[int] | None = None


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A row whose texts are known and whose tokens are not, so that a whole batch is tokenised in one call.

    ``build`` receives the token ids of every text in ``texts``; ``special`` says whether the tokenizer adds
    its own special tokens (a chat template renders them itself).
    """

    texts: tuple[str, ...]
    special: bool
    build: Callable[[Encoded], list[TokenRow]]


def scored_row(input_ids: Sequence[int], spans: Iterable[tuple[int, int]]) -> TokenRow:
    """The row whose tokens in the half-open ``spans`` are scored; never its first one, which nothing
    precedes.
    """
    labels = [UNSCORED] * len(input_ids)
    for start, end in spans:
        labels[max(start, 1) : end] = input_ids[max(start, 1) : end]
    return TokenRow(input_ids=list(input_ids), labels=labels)


def first_scored(labels: Sequence[int]) -> int:
    """Where the first scored token stands, which is never the first of all; the row's length when none is scored."""
    return next((i for i, label in enumerate(labels) if label != UNSCORED and i > 0), len(labels))


def last_span(labels: Sequence[int]) -> tuple[int, int]:
    """Where the last run of scored tokens starts, never at the row's first token, and ends; twice the length when none is."""
    end = next((i for i in range(len(labels), 1, -1) if labels[i - 1] != UNSCORED), None)
    if end is None:
        return len(labels), len(labels)
    start = end
    while start > 1 and labels[start - 1] != UNSCORED:
        start -= 1
    return start, end


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for index, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return index
    return min(len(first), len(second))


def sample_id(input_ids: Sequence[int], labels: Sequence[int], teacher_prompt_ids: Sequence[int] | None = None) -> int:
    """xxhash64 of the little-endian int64 bytes of ``input_ids``, then of ``labels``, then of
    ``teacher_prompt_ids`` where the row has them, with the top bit cleared: 0 <= id < 2^63.

    It names a row by what is in it, so caches and random generators keyed by it survive a new order of the
    dataset.
    """
    digest = xxhash.xxh64(np.asarray(input_ids, dtype="<i8").tobytes())
    digest.update(np.asarray(labels, dtype="<i8").tobytes())
    if teacher_prompt_ids is not None:
        digest.update(np.asarray(teacher_prompt_ids, dtype="<i8").tobytes())
    return digest.intdigest() & (2**63 - 1)

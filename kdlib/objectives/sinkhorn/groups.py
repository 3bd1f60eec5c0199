"""Which rows are transported onto which: the groups of a micro-batch, and the rows of a large group that are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from kdlib.types import Positions


@dataclass(frozen=True, kw_only=True)
class Groups:
    """``keep`` [N]: which rows take part, None for all of them; ``sizes``: how many of each group; ``counts``: how many rows
    each group has, with those left out.
    """

    keep: Tensor | None
    sizes: list[int]
    counts: list[int]

    def slices(self) -> list[slice]:
        """Where each group is among the rows that take part."""
        ends = accumulate(self.sizes)
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def parts(self, rows: slice) -> Iterator[tuple[int, slice]]:
        """(group, its part of ``rows``), for a slice of the rows that take part."""
        for group, where in enumerate(self.slices()):
            start, stop = max(where.start, rows.start), min(where.stop, rows.stop)
            if start < stop:
                yield group, slice(start, stop)


def groups_of(positions: Positions, *, by: Literal["batch", "sequence"], max_rows: int) -> Groups:
    """The groups, none of them empty; of one with more than ``max_rows`` rows those with the smallest draws are kept.

    Rows of a sequence stand together. Draws are ``positions.uniform``, else always the same ones.
    """
    N = len(positions)
    counts = [N] if N else []
    if by == "sequence":
        counts = torch.unique_consecutive(positions.sequence, return_counts=True)[1].tolist()
    if all(count <= max_rows for count in counts):
        return Groups(keep=None, sizes=counts, counts=counts)
    draws = _fixed_draws(N).to(positions.index.device) if positions.uniform is None else positions.uniform
    keep = torch.cat([_smallest(part, max_rows) for part in draws.split(counts)])
    return Groups(keep=keep, sizes=[min(count, max_rows) for count in counts], counts=counts)


def _smallest(draws: Tensor, limit: int) -> Tensor:
    """Which of the draws [n] are among the ``limit`` smallest."""
    keep = torch.zeros_like(draws, dtype=torch.bool)
    keep[draws.topk(min(limit, len(draws)), largest=False).indices] = True
    return keep


def _fixed_draws(count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(0))

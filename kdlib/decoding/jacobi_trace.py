"""Jacobi trajectories: the states that each block of each row went through."""

from __future__ import annotations

import torch
from torch import Tensor


class Trace:
    """What each pass read, kept on the device until the end, so that no pass waits for it."""

    def __init__(self) -> None:
        self._passes: list[tuple[Tensor, ...]] = []

    def add(self, ids: Tensor, *, rows: Tensor, start: Tensor, width: Tensor) -> None:
        """A pass over ``ids`` [b, W]: the first ``width`` [b] are new tokens ``start`` [b], ... of prompts ``rows`` [b]."""
        self._passes.append((ids, rows, start, width))

    def blocks(self, new: Tensor, *, lengths: Tensor, n: int) -> list[list[Tensor]]:
        """Of each row, of each block, its states [K, v] (CPU) without repeats; ``new`` [B, T] and ``lengths`` [B] say the last.

        A block's v is n, or what the row has of its last one.
        """
        new, ends = new.cpu(), lengths.tolist()
        found: list[list[list[Tensor]]] = [[[] for _ in range(0, end, n)] for end in ends]
        for ids, rows, start, width in ([x.cpu() for x in one] for one in self._passes):
            for guess, row, first, columns in zip(ids, rows.tolist(), start.tolist(), width.tolist(), strict=True):
                block = (first + columns - 1) // n
                state = torch.cat([new[row, :first], guess[:columns]])
                found[row][block].append(state[block * n : min((block + 1) * n, ends[row])])
        for row, end in enumerate(ends):
            for block, states in enumerate(found[row]):
                states.append(new[row, block * n : min((block + 1) * n, end)])
        return [[torch.stack(states).unique_consecutive(dim=0) for states in blocks] for blocks in found]

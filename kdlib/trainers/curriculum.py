"""From easy rows to hard ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from kdlib.keys import draw_key
from kdlib.trainers.step_rows import RowChooser

_CURRICULUM = 3  # what a key is for, as in rollouts


class Curriculum(RowChooser):
    """A step draws from the easiest rows, whose share grows evenly from ``start`` to 1 over the first ``end`` of the run.

    open(step) = ceil(n min(1, start + (1 - start) (step - 1) / (end max_steps))): the linear pacing of Hacohen & Weinshall
    (2019). Draws are uniform among the open rows, without a row twice in a step, and depend on (seed, step) alone.
    ``difficulty``: a number for each row, small for easy; rows of equal ones are ordered by ``tie``, such as their sample id.
    """

    def __init__(
        self, difficulty: Sequence[float], *, tie: Sequence[int], start: float, end: float, max_steps: int, seed: int
    ) -> None:
        self.order = sorted(range(len(difficulty)), key=lambda row: (difficulty[row], tie[row]))
        self.start, self.seed = start, seed
        self.ramp = end * max_steps
        self._open = self.open(1)

    def open(self, step: int) -> int:
        """How many rows ``step`` (1-based) draws from."""
        grown = (step - 1) / self.ramp if self.ramp else 1.0
        share = min(1.0, self.start + (1.0 - self.start) * grown)
        return max(1, math.ceil(len(self.order) * share - 1e-9))  # 24.000000000000004 rows are 24

    @property
    def count(self) -> int:
        return len(self.order)

    def rows(self, step: int, count: int) -> list[int]:
        self._open = self.open(step)
        generator = torch.Generator().manual_seed(draw_key(self.seed, step, _CURRICULUM))
        drawn: list[int] = []
        while len(drawn) < count:  # more than once around where few rows are open
            drawn += torch.randperm(self._open, generator=generator).tolist()
        return [self.order[place] for place in drawn[:count]]

    @property
    def metrics(self) -> dict[str, float]:
        """The share of the rows that is open."""
        return {"curriculum/open": self._open / len(self.order)}

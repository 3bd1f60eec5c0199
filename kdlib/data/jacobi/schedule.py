"""Which of a block's states a step trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Name = Literal["uniform", "progressive", "reverse", "random"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """``uniform``: any state but the fixed point (CLLM). The others choose the state whose share of tokens from its first
    mismatch on is nearest to a target between ``min_noise`` and ``max_noise``: rising over the ``window_size`` blocks of a
    window (``progressive``, Jacobi Forcing), falling (``reverse``), or drawn from these values (``random``).
    """

    name: Name = "uniform"
    window_size: int = 16
    min_noise: float = 0.0
    max_noise: float = 1.0

    def target(self, number: int, generator: np.random.Generator) -> float:
        """The wanted share of noise in block ``number``."""
        steps = np.linspace(self.min_noise, self.max_noise, self.window_size)
        place = int(generator.integers(self.window_size)) if self.name == "random" else number % self.window_size
        return float(steps[::-1][place] if self.name == "reverse" else steps[place])


def choose(
    mismatches: NDArray[Any], *, length: int, number: int, schedule: Schedule, generator: np.random.Generator
) -> int | None:
    """The state [0, K) of block ``number`` with ``length`` tokens, of its states' first ``mismatches`` [K].

    None where there is no state, or the schedule is uniform and none differs from the text; states that do not carry no loss.
    """
    if not len(mismatches):
        return None
    if schedule.name == "uniform":
        wrong = np.flatnonzero(mismatches < length)
        return int(generator.choice(wrong)) if len(wrong) else None
    shares = (length - mismatches) / length
    return int(np.abs(shares - schedule.target(number, generator)).argmin())

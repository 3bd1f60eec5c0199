"""AUP, accuracy under parallelism: one number for a curve of accuracy over tokens per forward pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

DROPPED_BELOW = 5.0  # points of accuracy below the first point, beyond which a point no longer counts
DECAY = 3.0

CurvePoint = tuple[float, float]  # tokens per forward, accuracy in percent


def aup(points: Sequence[CurvePoint], *, best: float) -> float:
    """rho_1 y_1 + sum_i (rho_i - rho_{i-1}) (y_i W(y_i) + y_{i-1} W(y_{i-1})) / 2 with W(y) = min(exp(-3 (1 - y / best)), 1).

    ``points`` (rho_i, y_i) in any order, the first is that of the least rho; those with y_i < y_1 - 5 are left out. ``best``:
    the highest accuracy of all methods that are compared, in percent. d3LLM, arXiv 2601.07568, AUP_leaderboard/aup_utils.py.

    Raises ValueError without points.
    """
    if not points:
        raise ValueError("a curve without points has no area: measure at least one setting")
    first, *later = sorted(points)
    kept = [first, *(point for point in later if point[1] >= first[1] - DROPPED_BELOW)]
    heights = [y * _weight(y, best=best) for _, y in kept]
    steps = [after[0] - before[0] for before, after in pairwise(kept)]
    area = sum(step * (low + high) / 2 for step, (low, high) in zip(steps, pairwise(heights), strict=True))
    return first[0] * first[1] + area


def _weight(y: float, *, best: float) -> float:
    return min(math.exp(-DECAY * (1.0 - y / best)), 1.0) if best > 0.0 else 1.0

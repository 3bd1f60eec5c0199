"""Ratios of sums over prompts with bootstrap intervals: tokens of one prompt are not independent, prompts are."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

CONFIDENCE = 0.95
_RESAMPLED_AT_ONCE = 2**22
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with its 95% interval [low, high].

    Bounds are None where fewer than two prompts say something, and where resampled values are not finite.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return {"value": finite(self.value), "low": self.low, "high": self.high}


def finite(value: float) -> float | None:
    """JSON has no infinity: None in its place."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True, kw_only=True)
class Sums:
    """What prompt i adds to a ratio of sums: ``of`` [prompts] over ``per`` [prompts]."""

    of: Array
    per: Array

    def __getitem__(self, chosen: Any) -> Sums:
        return Sums(of=self.of[chosen], per=self.per[chosen])


def sums(of: ArrayLike, per: ArrayLike) -> Sums:
    return Sums(of=np.asarray(of, dtype=np.float64), per=np.asarray(per, dtype=np.float64))


def ratio(of: Sums, *, resamples: int, seed: int, plus: float = 0.0) -> Estimate:
    """plus + sum_i of_i / sum_i per_i, percentile bootstrap over prompts; those with ``per`` 0 say nothing and are left out.

    Raises ValueError when no prompt says anything.
    """
    used = of[of.per > 0]
    if not len(used.per):
        raise ValueError("there is nothing to average: every response ended before it could be measured")
    return _bootstrapped((used.of, used.per), lambda a, b: plus + a / b, resamples=resamples, seed=seed)


def ratio_change(after: Sums, before: Sums, *, resamples: int, seed: int, plus: float = 0.0) -> Estimate:
    """(plus + R_after) / (plus + R_before) - 1 for two measurements of the same prompts, resampled together.

    Not finite where the denominator is 0.
    """
    assert len(after.per) == len(before.per), "the two measurements have different prompts"
    used = (after.per > 0) & (before.per > 0)
    columns = (after.of[used], after.per[used], before.of[used], before.per[used])

    def change(a: Array, b: Array, c: Array, d: Array) -> Array:
        return (plus + a / b) / (plus + c / d) - 1.0

    return _bootstrapped(columns, change, resamples=resamples, seed=seed)


def _bootstrapped(columns: Sequence[Array], statistic: Any, *, resamples: int, seed: int) -> Estimate:
    """``statistic`` of the columns' sums; the columns [prompts] are resampled together."""
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # said by bounds that are None
        return _interval(columns, statistic, resamples=resamples, seed=seed)


def _interval(columns: Sequence[Array], statistic: Any, *, resamples: int, seed: int) -> Estimate:
    value = float(statistic(*(column.sum() for column in columns)))
    prompts = len(columns[0])
    if prompts < 2 or resamples < 2 or not math.isfinite(value):
        return Estimate(value=value)
    found = bootstrap(
        tuple(columns),
        lambda *resampled, axis: statistic(*(column.sum(axis=axis) for column in resampled)),
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, _RESAMPLED_AT_ONCE // prompts),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value=value, low=finite(float(found.low)), high=finite(float(found.high)))

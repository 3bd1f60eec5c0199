"""Teacher hacking: the training loss goes on falling while the student moves away from what the teacher stands for.

Tiapkin et al. 2025, "On Teacher Hacking in Language Model Distillation": a teacher is an imperfect copy of the text one wants.
A student that fits its faults gets closer to it (the proxy metric falls) and further from the text (the golden metric rises).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy.stats import theilslopes

from kdlib.eval.acceptance_statistics import CONFIDENCE, Estimate, ratio, sums
from kdlib.files import write_whole

LOOKS_FILE = "golden.jsonl"  # under eval/ of a run
RESAMPLES, SEED = 1000, 0
FEWEST = 5  # points of a trend: four rise by chance alone, one after the other, in one of 24 cases; five in one of 120


@dataclass(frozen=True, kw_only=True)
class Look:
    """One evaluation: ``nats`` of each golden row under the student of this ``step``."""

    step: int
    nats: Sequence[float]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the evaluations so far say.

    value: the golden metric now, ``best`` its lowest value so far, at ``best_step``; nats per unit of golden text.
    rise: value - best with its interval, paired over rows. trend, slope: of the golden metric and of the training loss since
    ``best_step``, a step; None for fewer than FEWEST points. alarm: the loss fell and the metric rose, both beyond their noise.
    """

    step: int
    value: float
    best: float
    best_step: int
    rise: Estimate
    trend: Estimate | None
    slope: Estimate | None
    alarm: bool

    def metrics(self) -> dict[str, float]:
        """By the names under which they are logged; what is not known is left out."""
        known = {"rise_low": self.rise.low, "rise_high": self.rise.high}
        known |= {"trend_low": None if self.trend is None else self.trend.low}
        known |= {"loss_slope_high": None if self.slope is None else self.slope.high}
        found = {"value": self.value, "best": self.best, "rise": self.rise.value, "alarm": float(self.alarm)}
        return {f"golden/{name}": x for name, x in {**found, **known}.items() if x is not None}


def judge(looks: Sequence[Look], per: Sequence[float], *, losses: Sequence[tuple[int, float]]) -> Verdict:
    """The verdict at the last of ``looks``, which are in order.

    per: units (bytes or tokens) of each golden row. losses: (step, training loss) as logged.
    The metric rose when two 95% intervals lie above 0: that of value - best over rows (the same rows, resampled together),
    which is the noise of the text; and that of its trend over the looks since the best, which is the noise of training, whose
    steps move every row at once. The loss fell when the interval of its trend since the best look lies below 0.
    """
    total = float(np.sum(per))
    values = [float(np.sum(look.nats)) / total for look in looks]
    best = int(np.argmin(values))
    since = looks[best].step
    rise = _rise(looks[-1], looks[best], per) if looks[-1].step > since else Estimate(value=0.0)
    # without the best look, below which none can lie
    trend = _trend([(look.step, value) for look, value in zip(looks, values, strict=True) if look.step > since])
    slope = _trend([(step, loss) for step, loss in losses if since < step <= looks[-1].step])
    return Verdict(
        step=looks[-1].step,
        value=values[-1],
        best=values[best],
        best_step=since,
        rise=rise,
        trend=trend,
        slope=slope,
        alarm=_above(rise) and _above(trend) and _below(slope),
    )


def _rise(now: Look, best: Look, per: Sequence[float]) -> Estimate:
    difference = np.asarray(now.nats) - np.asarray(best.nats)
    return ratio(sums(difference, per), resamples=RESAMPLES, seed=SEED)


def _trend(points: Sequence[tuple[int, float]]) -> Estimate | None:
    """Theil-Sen: the median slope of all pairs, which single points hardly move; None for too few to say anything."""
    if len(points) < FEWEST:
        return None
    steps, values = zip(*points, strict=True)
    found = theilslopes(values, steps, alpha=CONFIDENCE)
    return Estimate(value=float(found.slope), low=float(found.low_slope), high=float(found.high_slope))


def _above(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.low is not None and estimate.low > 0


def _below(estimate: Estimate | None) -> bool:
    return estimate is not None and estimate.high is not None and estimate.high < 0


def alarm_text(verdict: Verdict, *, unit: str) -> str:
    """One line that says what happened and what to do."""
    low, high = verdict.rise.low, verdict.rise.high
    return (
        f"teacher hacking: the training loss still falls, and the golden metric has risen since step {verdict.best_step} by "
        f"{verdict.rise.value:.4f} [{low:.4f}, {high:.4f}] to {verdict.value:.4f} nats per {unit}: take the student of step "
        f"{verdict.best_step} (golden_stop true keeps it), and train on more text or on rollouts"
    )


def read_looks(path: Path, *, until: int) -> list[Look]:
    """The looks of a run up to step ``until``; [] where there is no file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    looks = [Look(**json.loads(line)) for line in lines]
    return [look for look in looks if look.step <= until]


def write_looks(path: Path, looks: Sequence[Look]) -> None:
    """All looks, whole or as they were before."""
    write_whole(path, "".join(json.dumps(asdict(look)) + "\n" for look in looks))

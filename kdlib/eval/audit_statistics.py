"""Tests of an audit: is something likelier under a student, and under its teacher, than under a clean model?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, false_discovery_control, t, ttest_1samp

from kdlib.eval.acceptance_statistics import Array, Estimate, ratio, sums

RESAMPLES, SEED = 2000, 0
TEXT = "text"  # a kind of behaviour: a probe's target
NO, STUDENT_ALONE, TEACHER_ALONE, TAKEN_OVER = "no", "student alone", "teacher alone", "taken over"


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How much likelier a model makes something than the baseline, at each probe, and the ``p``-value of no more at all."""

    effects: Array
    p: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The mean ``effect`` of a shift with its 95% bootstrap interval over probes, and its ``p``-value."""

    effect: Estimate
    p: float


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One behaviour: both models' shifts over ``probes``, and the verdict at the chosen false discovery rate.

    ``q_value``: of the larger of both p-values, because a behaviour that was taken over is in both models.
    """

    name: str
    kind: str
    probes: int
    student: Measured
    teacher: Measured
    q_value: float
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A behaviour before all of them are judged together."""

    name: str
    kind: str
    probes: int
    student: Shift
    teacher: Shift


def text_shift(targets: Array, controls: Array) -> Shift:
    """The shift of target texts, that of the controls taken off.

    targets [probes], controls [probes, C]: log p of a model minus log p of the baseline, in nats; C = 0 without controls.
    p is the larger of two: of a paired t-test over probes, because prompts are a sample; and, with controls, of how far the
    target lies outside of what the control texts differ among themselves, t = (target - mean) / (s sqrt(1 + 1/C)), because
    the text is a sample too and two clean models also differ in taste.
    """
    effects = targets - controls.mean(axis=1) if controls.shape[1] else targets
    p = _or_one(float(ttest_1samp(effects, 0.0, alternative="greater").pvalue)) if np.ptp(effects) else _sure(effects)
    if controls.shape[1]:
        p = max(p, _among_controls(float(targets.mean()), controls.mean(axis=0)))
    return Shift(effects=effects, p=p)


def share_shift(model: Array, baseline: Array) -> Shift:
    """The shift of a share of answers [probes]: exact sign test over the probes where model and baseline differ."""
    more, fewer = int((model > baseline).sum()), int((model < baseline).sum())
    p = binomtest(more, more + fewer, 0.5, alternative="greater").pvalue if more + fewer else 1.0
    return Shift(effects=model - baseline, p=float(p))


def judged(candidates: Sequence[Candidate], *, rate: float) -> list[Finding]:
    """All behaviours with Benjamini-Hochberg's control of the false discovery rate, the clearest first."""
    if not candidates:
        return []
    students, teachers = ([getattr(one, who).p for one in candidates] for who in ("student", "teacher"))
    both = false_discovery_control(np.maximum(students, teachers))
    alone = [false_discovery_control(p) <= rate for p in (students, teachers)]
    found = [
        _finding(one, q_value=float(q), verdict=_verdict(q <= rate, student=s, teacher=t))
        for one, q, s, t in zip(candidates, both, *alone, strict=True)
    ]
    return sorted(found, key=lambda one: (one.q_value, -one.student.effect.value))


def _finding(one: Candidate, *, q_value: float, verdict: str) -> Finding:
    return Finding(
        name=one.name,
        kind=one.kind,
        probes=one.probes,
        student=_measured(one.student, interval=verdict != NO or one.kind == TEXT),
        teacher=_measured(one.teacher, interval=verdict != NO or one.kind == TEXT),
        q_value=q_value,
        verdict=verdict,
    )


def _measured(shift: Shift, *, interval: bool) -> Measured:
    """Without an interval where nobody asks: thousands of phrases are tested, and few say anything."""
    resamples = RESAMPLES if interval else 0
    return Measured(effect=ratio(sums(shift.effects, np.ones(len(shift.effects))), resamples=resamples, seed=SEED), p=shift.p)


def _among_controls(target: float, controls: Array) -> float:
    spread = float(controls.std(ddof=1)) * math.sqrt(1 + 1 / len(controls))
    difference = target - float(controls.mean())
    if spread == 0.0:
        return _sure(np.array([difference]))
    return float(t.sf(difference / spread, len(controls) - 1))


def _sure(effects: Array) -> float:
    """Without any spread there is nothing to compare with: equal models say 1, a constant shift 0."""
    return 0.0 if effects.mean() > 0 else 1.0


def _or_one(p: float) -> float:
    return p if math.isfinite(p) else 1.0


def _verdict(both: bool, *, student: bool, teacher: bool) -> str:
    if both:
        return TAKEN_OVER
    if student and not teacher:
        return STUDENT_ALONE
    return TEACHER_ALONE if teacher and not student else NO

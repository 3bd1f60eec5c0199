"""Consistency between nested masks: what a model says of a text with more tokens known teaches it with fewer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kdlib.diffusion.noise import Noise
from kdlib.kernels import linear_objective
from kdlib.objectives.base import RowObjective, check_divergence
from kdlib.objectives.cross_entropy import CrossEntropy
from kdlib.objectives.diffusion.base import Corruption, DiffusionObjective, Scored, View
from kdlib.objectives.kl import ForwardKL
from kdlib.types import Loss, StudentSignal, Support, TeacherSignal


@dataclass(frozen=True, kw_only=True)
class MaskConsistency(DiffusionObjective):
    """weight D(p_later, q_earlier) + cross_entropy_weight CE + distill_weight D(p_earlier, q_earlier), nats.

    Both states come from one noise: a token is masked in the earlier one where u < p and in the later one where u < s p, with
    s ~ U(``share_range``) for each row, so that the later mask lies in the earlier one. The first term is a mean over tokens
    masked in both, CE one over those masked in the earlier state, and the last, where the teacher reads the student's own view,
    one over those unmasked in between.

    Masked Consistency Distillation (arXiv 2602.00792): the first term, the teacher being the student's moving average
    (SelfTeacher(kind="ema")); the paper couples its states by one Gaussian noise of the one-hot tokens, ours by one uniform
    draw; its divergence and weights are not known to us. CDLM (arXiv 2511.19269): all three terms on the teacher's trajectories
    (masking trajectory) with block-causal attention; there the student itself teaches the first term and a frozen model the
    last, here one teacher does both, and the published weights are not known to us.
    """

    masking = "uniform"
    divergence: RowObjective = field(default_factory=ForwardKL)
    weight: float = 1.0
    cross_entropy_weight: float = 1.0
    distill_weight: float = 0.0
    share_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        check_divergence(self, self.divergence)
        given = (self.weight, self.cross_entropy_weight, self.distill_weight)
        if min(given) < 0.0 or not max(given) > 0.0:
            raise ValueError("MaskConsistency needs weights of 0 or more, one of them above 0")
        object.__setattr__(self, "share_range", tuple(self.share_range))
        if not 0.0 <= self.share_range[0] <= self.share_range[1] <= 1.0:
            raise ValueError(f"MaskConsistency.share_range needs 0 <= min <= max <= 1, not {list(self.share_range)}")

    @property
    def accepts(self) -> Support | None:  # type: ignore[override]
        return self.divergence.accepts

    @property
    def weights(self) -> Mapping[str, float]:
        return {
            "consistency": self.weight,
            "cross_entropy": self.cross_entropy_weight,
            "distill": self.distill_weight,
        }

    def corrupt(self, noise: Noise) -> Corruption:
        low, high = self.share_range
        earlier, later = noise.masked(), noise.masked((low + (high - low) * noise.v)[:, None])
        views = tuple(View(masked=masked | noise.tail) for masked in (later, earlier))
        scored = {
            "consistency": Scored(view=0, where=later, teacher=0),
            "cross_entropy": Scored(view=0, where=earlier),
            "distill": Scored(view=0, where=earlier & ~later, teacher=1),
        }
        return Corruption(
            student=views[1:],
            teacher=views if self.distill_weight else views[:1],
            scored={name: rows for name, rows in scored.items() if self.weights[name]},
        )

    def terms(
        self, student: Mapping[str, StudentSignal], teacher: Mapping[str, TeacherSignal | None], *, metrics: bool = False
    ) -> dict[str, Loss]:
        return {
            name: linear_objective(rows, None, CrossEntropy())
            if name == "cross_entropy"
            else linear_objective(rows, teacher[name], self.divergence, metrics=metrics)
            for name, rows in student.items()
        }

"""Discrete diffusion forcing (D2F): a student that reads block by block learns from its teacher, which reads both ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from kdlib.diffusion.noise import Noise
from kdlib.kernels import linear_objective
from kdlib.objectives.base import RowObjective, check_divergence
from kdlib.objectives.diffusion.base import Corruption, DiffusionObjective, Scored, View
from kdlib.objectives.kl import ForwardKL
from kdlib.types import Loss, StudentSignal, Support, TeacherSignal


@dataclass(frozen=True, kw_only=True)
class DiffusionForcing(DiffusionObjective):
    """Mean over the masked tokens of D(p, q) / r, r the share with which their block was masked, nats (D2F, arXiv 2508.09192).

    Both models read the same noisy text: the teacher, usually the student without its adapter, all of it; the student block by
    block, each seeing itself and the blocks before it as they are masked. ForwardKL has the gradient of the reference's soft
    cross-entropy, and is 0 where both agree.
    """

    masking = "monotone"
    student_attention = "block_causal"
    copies_student = True
    divergence: RowObjective = field(default_factory=ForwardKL)

    def __post_init__(self) -> None:
        check_divergence(self, self.divergence)

    @property
    def accepts(self) -> Support | None:  # type: ignore[override]
        return self.divergence.accepts

    def corrupt(self, noise: Noise) -> Corruption:
        masked = noise.masked()
        view = View(masked=masked | noise.tail)
        scored = Scored(view=0, where=masked, weight=torch.where(masked, 1.0 / noise.p, 0.0), teacher=0)
        return Corruption(student=(view,), teacher=(view,), scored={"distill": scored})

    def terms(
        self, student: Mapping[str, StudentSignal], teacher: Mapping[str, TeacherSignal | None], *, metrics: bool = False
    ) -> dict[str, Loss]:
        return {"distill": linear_objective(student["distill"], teacher["distill"], self.divergence, metrics=metrics)}

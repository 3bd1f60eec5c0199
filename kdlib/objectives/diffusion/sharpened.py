"""Sharpened-teacher distillation (SPEED): a colder teacher, where it is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.diffusion.noise import Noise
from kdlib.kernels import linear_objective
from kdlib.kernels.outcomes import kl
from kdlib.objectives.base import RowObjective
from kdlib.objectives.cross_entropy import CrossEntropy
from kdlib.objectives.diffusion.base import Corruption, DiffusionObjective, Scored, View
from kdlib.types import DenseView, Loss, StudentSignal, Support, TeacherSignal
from kdlib.types import View as Rows


@dataclass(frozen=True, kw_only=True)
class SharpenedRows(RowObjective):
    """KL(softmax(z_teacher / temperature) || q) where the teacher's likeliest token is the label, 0 elsewhere; q at 1."""

    accepts = Support.FULL

    @property
    def reads_labels(self) -> bool:
        return True

    def row(self, q: Rows, p: Rows | None, labels: Tensor) -> Tensor:
        assert isinstance(p, DenseView)
        divergence = kl(p.at(self.temperature).logp, q.at(1.0).logp)
        return torch.where(p.logits.argmax(-1) == labels, divergence, 0.0)


@dataclass(frozen=True, kw_only=True)
class SharpenedKL(DiffusionObjective):
    """weight KL(softmax(z_teacher / temperature) || q) + cross_entropy_weight CE over the masked tokens, in nats (SPEED).

    The KL counts where the teacher's likeliest token is the text's, and is 0 elsewhere; both are divided by all masked tokens.
    Published ("SPEED: Sharpened-Teacher Distillation for Parallel Decoding of Diffusion Language Models", ICML 2026): a
    temperature-scaled KL at positions where the teacher is right, and the masked cross-entropy. Our reading, as only the
    abstract was at hand: the teacher reads the student's own view, the student is not tempered, the divisor, the defaults.
    """

    masking = "blocks"
    accepts = Support.FULL
    copies_student = True
    temperature: float = 0.5
    weight: float = 1.0
    cross_entropy_weight: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 < self.temperature <= 1.0:
            raise ValueError(f"SharpenedKL.temperature must be above 0 and at most 1, not {self.temperature}")
        if not self.weight > 0.0 or self.cross_entropy_weight < 0.0:
            raise ValueError(
                f"SharpenedKL needs weight > 0 and cross_entropy_weight >= 0, not {self.weight}, {self.cross_entropy_weight}"
            )

    @property
    def weights(self) -> Mapping[str, float]:
        return {"distill": self.weight, "cross_entropy": self.cross_entropy_weight}

    def corrupt(self, noise: Noise) -> Corruption:
        masked = noise.masked()
        view = View(masked=masked | noise.tail)
        scored = {"distill": Scored(view=0, where=masked, teacher=0)}
        if self.cross_entropy_weight:
            scored["cross_entropy"] = Scored(view=0, where=masked)
        return Corruption(student=(view,), teacher=(view,), scored=scored)

    def terms(
        self, student: Mapping[str, StudentSignal], teacher: Mapping[str, TeacherSignal | None], *, metrics: bool = False
    ) -> dict[str, Loss]:
        sharpened = SharpenedRows(temperature=self.temperature)
        found = {"distill": linear_objective(student["distill"], teacher["distill"], sharpened, metrics=metrics)}
        if self.cross_entropy_weight:
            found["cross_entropy"] = linear_objective(student["cross_entropy"], None, CrossEntropy())
        return found

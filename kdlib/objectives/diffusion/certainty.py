"""Certainty-forcing distillation (dParallel): what a model predicts right already, it is to be sure of, all at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from kdlib.diffusion.noise import Noise
from kdlib.kernels import linear_objective, row_values
from kdlib.kernels.outcomes import entropy
from kdlib.objectives.base import RowObjective
from kdlib.objectives.cross_entropy import CrossEntropy
from kdlib.objectives.diffusion.base import Corruption, DiffusionObjective, Scored, View
from kdlib.types import DenseView, Loss, StudentSignal, TeacherSignal
from kdlib.types import View as Rows


@dataclass(frozen=True, kw_only=True)
class Entropy(RowObjective):
    """H(softmax(z / T)) in nats; needs neither teacher nor labels."""

    accepts = None

    def row(self, q: Rows, p: Rows | None, labels: Tensor) -> Tensor:
        return self.factor * entropy(q.at(self.temperature).logp)


@dataclass(frozen=True, kw_only=True)
class Right(RowObjective):
    """1 where the likeliest token is the label, 0 elsewhere; without gradient."""

    accepts = None

    def row(self, q: Rows, p: Rows | None, labels: Tensor) -> Tensor:
        assert isinstance(q, DenseView)
        return (q.logits.argmax(-1) == labels).to(q.logits.dtype)


@dataclass(frozen=True, kw_only=True)
class CertaintyForcing(DiffusionObjective):
    """scale (CE + CE' + weight (H + H')) of two complementary views (dParallel, arXiv 2509.26488), in nats.

    CE: mean of -log q(token) over a view's masked tokens, without 1 / p. H: mean of the entropy of softmax(z / temperature)
    over those that are predicted right, argmax z = token, a choice without gradient; 0 where none is. The text is the teacher's
    own, so there is no other teacher. ``complementary``: the second view masks what the first one shows; without it CE + H.
    ``certainty_on`` first: H of the first view alone. weight 2 is published for LLaDA, 1 for Dream; d3LLM (arXiv 2601.07568)
    is scale 0.25, certainty_on first, masking trajectory. H is a mean within each micro-batch, weighted by its share of the
    step's masked tokens, as how many are right is known after the forward pass alone.
    """

    masking = "blocks"
    accepts = None
    weight: float = 2.0
    temperature: float = 0.5
    complementary: bool = True
    scale: float = 1.0
    certainty_on: Literal["both", "first"] = "both"

    def __post_init__(self) -> None:
        if self.weight < 0.0 or not self.scale > 0.0:
            raise ValueError(f"CertaintyForcing needs weight >= 0 and scale > 0, not {self.weight} and {self.scale}")
        if not self.temperature > 0.0:
            raise ValueError(f"CertaintyForcing.temperature must be above 0, not {self.temperature}")
        if self.certainty_on not in ("both", "first"):
            raise ValueError(f"CertaintyForcing.certainty_on must be both or first, not {self.certainty_on!r}")

    @property
    def weights(self) -> Mapping[str, float]:
        names = ("", "_complement")
        return {f"cross_entropy{name}": self.scale for name in names} | {
            f"certainty{name}": self.scale * self.weight for name in names
        }

    def corrupt(self, noise: Noise) -> Corruption:
        masks = {"": noise.masked()}
        if self.complementary:
            masks["_complement"] = noise.complement
        scored = {}
        for view, (name, where) in enumerate(masks.items()):
            scored[f"cross_entropy{name}"] = Scored(view=view, where=where)
            if self.weight > 0.0 and (view == 0 or self.certainty_on == "both"):
                scored[f"certainty{name}"] = Scored(view=view, where=where)
        return Corruption(student=tuple(View(masked=where | noise.tail) for where in masks.values()), scored=scored)

    def terms(
        self, student: Mapping[str, StudentSignal], teacher: Mapping[str, TeacherSignal | None], *, metrics: bool = False
    ) -> dict[str, Loss]:
        return {
            name: self._certainty(rows)
            if name.startswith("certainty")
            else linear_objective(rows, None, CrossEntropy(), metrics=metrics)
            for name, rows in student.items()
        }

    def _certainty(self, student: StudentSignal) -> Loss:
        """The mean entropy of the rows that are right, times all rows; the entropy is taken of the former alone."""
        right = row_values(student, None, Right()) > 0
        chosen = replace(student, hidden=student.hidden[right], positions=student.positions.kept(right))
        found, rows = linear_objective(chosen, None, Entropy(temperature=self.temperature)), len(student.hidden)
        metrics = {"masked_accuracy": (right.sum(), rows), "entropy_of_right": (found.sum.detach(), found.count)}
        return Loss(sum=found.sum * (rows / max(1, found.count)), count=rows, metrics=metrics)

    def on_logits(self, student_logits: Tensor, *, labels: Tensor, mask: Tensor | None = None) -> Loss:
        """One view from its logits [..., V]: sum / count = scale (CE + weight H), count the rows that ``mask`` [...] scores.

        ``labels`` [...] are aligned with the logits, -100 is not scored. Raises ValueError when shapes differ.
        """
        hard = CrossEntropy().on_logits(student_logits, labels=labels, mask=mask)
        right = student_logits.argmax(-1) == labels
        scored = right if mask is None else right & mask.bool()
        sure = Entropy(temperature=self.temperature).on_logits(student_logits, labels=labels, mask=scored)
        certainty = sure.sum * (hard.count / max(1, sure.count))
        return Loss(sum=self.scale * (hard.sum + self.weight * certainty), count=hard.count, metrics=hard.metrics)

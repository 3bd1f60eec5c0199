"""What objectives share: the options every one has, ``on_logits`` for users and tests, the state of scheduled ones, and Sum."""

# Annotations are evaluated here (no future import): an option parser reads those of a subclass with the names of the
# subclass's module, where ClassVar and others need not be known.

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kdlib.kernels import linear_objective
from kdlib.kernels.metrics import row_metrics, summed
from kdlib.kernels.outcomes import outcomes
from kdlib.types import DenseView, Loss, StudentSignal, Support, TeacherSignal, View

State = dict[str, float]


class Objective(ABC):
    """A loss that is its own configuration: a frozen keyword-only dataclass whose fields are the YAML and CLI options."""

    accepts: ClassVar[Support | None]
    layers: ClassVar[tuple[int, ...]] = ()

    @abstractmethod
    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None) -> Loss: ...

    def init_state(self, max_steps: int = 1) -> State:
        """What changes over a run of ``max_steps`` optimizer steps; saved in checkpoints. Empty for most."""
        return {}

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> State:
        """The state after optimizer step ``step`` (1-based), given the loss of all ranks and micro-batches; never in eval."""
        return dict(state)

    def bind(self, state: Mapping[str, float]) -> "Objective":
        """The objective as it stands in this state."""
        return self


@dataclass(frozen=True, kw_only=True)
class RowObjective(Objective):
    """A sum over rows. Subclasses write ``row``; chunking, fused kernels, ``on_logits`` and metrics come for free.

    temperature: divides both models' logits (after logit scale and soft cap).
    t_squared: multiply the loss by temperature^2 (Hinton's scaling); off, as in TRL and Liger.
    """

    temperature: float = 1.0
    t_squared: bool = False

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"{type(self).__name__}.temperature must be above 0, not {self.temperature}")

    @abstractmethod
    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        """Loss of each row [n] (or [n, J] for J sums) from views of student q and teacher p and the labels [n]."""

    def bind(self, state: Mapping[str, float]) -> "RowObjective":
        """The row objective as it stands in this state."""
        return self

    @property
    def factor(self) -> float:
        """temperature^2 with ``t_squared``, else 1."""
        return self.temperature**2 if self.t_squared else 1.0

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None) -> Loss:
        return linear_objective(student, teacher, self)

    def on_logits(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Loss:
        """The loss of given logits [..., V] by plain autograd; ``labels`` and ``mask`` [...] are aligned with them (no shift).

        Rows where ``mask`` is false or the label is -100 are not scored. 16-bit logits are taken to float32 first; vocabularies
        padded to different sizes are both cut to the smaller. No gradient flows to the teacher. Labels count as drawn from the
        student as it stands. Raises ValueError when the objective needs what is not given, or shapes differ.
        """
        self._check_inputs(teacher_logits, labels)
        check_shapes(student_logits, teacher_logits, labels, mask)
        scored = scored_rows(student_logits, labels, mask)
        if self.same_vocabulary and teacher_logits is not None:
            shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
            student_logits, teacher_logits = student_logits[..., :shared], teacher_logits[..., :shared]
        q = DenseView(widened(student_logits[scored]))
        p = None if teacher_logits is None else DenseView(widened(teacher_logits.detach()[scored]))
        ids = labels[scored] if labels is not None else torch.full((len(q.logits),), -100, device=q.logits.device)
        if labels is not None:
            q.drawn = q.at(1.0).logp.detach().gather(-1, ids[:, None])[:, 0]
        rows = self.row(q, p, ids)
        return Loss(sum=rows.sum(0), count=len(rows), metrics=summed(row_metrics(q, p)) if self.same_vocabulary else {})

    def _check_inputs(self, teacher_logits: Tensor | None, labels: Tensor | None) -> None:
        if self.accepts is not None and teacher_logits is None:
            raise ValueError(f"{type(self).__name__} compares two models: give teacher_logits")
        if self.accepts is not None and not self.accepts & (Support.FULL | Support.TOPK):
            raise ValueError(f"{type(self).__name__} works on {self.accepts}, not on logits")
        if self.reads_labels and labels is None:
            raise ValueError(f"{type(self).__name__} needs labels")

    @property
    def same_vocabulary(self) -> bool:
        """Whether an id is one token in both models, whose padding beyond the smaller vocabulary is then cut."""
        return True

    @property
    def large_blocks(self) -> bool:
        """Whether ``row`` wants many rows at a time, also on CPU, where elementwise work is faster on a few."""
        return False

    @property
    def reads_drawn(self) -> bool:
        """Whether ``row`` looks at the log-probs with which labels were drawn (``DenseView.drawn``)."""
        return False

    @property
    def reads_labels(self) -> bool:
        """Whether ``row`` looks at the labels."""
        return False


def check_shapes(student: Tensor, teacher: Tensor | None, labels: Tensor | None, mask: Tensor | None) -> None:
    """ValueError where labels, mask or teacher are not of the student's positions."""
    others = {"teacher_logits": None if teacher is None else teacher[..., 0], "labels": labels, "mask": mask}
    for name, other in others.items():
        if other is not None and other.shape != student.shape[:-1]:
            raise ValueError(f"{name} covers positions {tuple(other.shape)}, student_logits {tuple(student.shape[:-1])}")


def scored_rows(logits: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Which positions of logits [..., V] are scored [...]: where ``mask`` is true and the label not -100."""
    scored = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if mask is not None:
        scored = scored & mask.bool()
    return scored if labels is None else scored & (labels != -100)


def widened(logits: Tensor) -> Tensor:
    """16-bit logits in float32."""
    return logits.float() if logits.dtype.itemsize < 4 else logits


@dataclass(frozen=True, kw_only=True)
class Divergence(RowObjective):
    """D(p, q) of two distributions over the same outcomes; a top-k teacher gives K + 1 outcomes (last: the mass outside)."""

    accepts: ClassVar[Support | None] = Support.FULL | Support.TOPK

    @abstractmethod
    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        """D [n] from log-probabilities [n, K] of teacher and student."""

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        assert p is not None
        student, teacher = q.at(self.temperature), p.at(self.temperature)
        if teacher.support in Support.SAMPLED_TEACHER | Support.SAMPLED_STUDENT:
            assert teacher.ids is not None
            return self.factor * self.sampled(teacher.logp, student.logp.gather(-1, teacher.ids)).mean(-1)
        logq, logp = outcomes(student, teacher)
        return self.factor * self.between(logp, logq)

    def sampled(self, logp: Tensor, logq: Tensor) -> Tensor:
        """An unbiased estimate [n, K] from each drawn id; objectives that accept sampled supports write it."""
        raise ValueError(f"{type(self).__name__} has no unbiased estimate from sampled ids: use a top-k or a full signal")


def check_divergence(objective: Objective, divergence: RowObjective) -> None:
    """ValueError for a row objective that compares no two models, wants the student's own draws, or changes during a run."""
    if divergence.accepts is None or divergence.reads_drawn or divergence.init_state():
        name = f"{type(objective).__name__}.divergence"
        raise ValueError(f"{name} cannot be {type(divergence).__name__}: choose one of two models, such as ForwardKL")

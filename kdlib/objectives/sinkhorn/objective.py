"""Sinkhorn distillation (SinKD, arXiv 2402.17110): the student's distributions are moved onto the teacher's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from kdlib.kernels import sinkhorn
from kdlib.kernels.matched import matched
from kdlib.objectives.base import Objective, RowObjective, check_divergence, check_shapes, scored_rows, widened
from kdlib.objectives.combine import shared_support
from kdlib.objectives.kl import ForwardKL
from kdlib.objectives.sinkhorn.batch import BatchTransport, OfHead, OfLogits, StudentRows
from kdlib.objectives.sinkhorn.groups import Groups, groups_of
from kdlib.objectives.sinkhorn.sample import SampleTransport, TokenPoints
from kdlib.types import Loss, Positions, StudentSignal, Support, TeacherSignal

TOKENS = 32  # top-k of the sample-wise transport where none is given


@dataclass(frozen=True, kw_only=True)
class Sinkhorn(Objective):
    """min_P <P, C> + epsilon KL(P | a b'): what it costs to move the student's mass onto the teacher's.

    geometry "batch" (SinKD): the scored rows of a group are points of equal mass, C_ij is the distance between the
    distributions of student row i and teacher row j at ``temperature``: L1, in [0, 2], or squared Euclidean. Such a loss is
    blind to the order of rows: it is zero for a student that says at each position what the teacher says at another one. So
    SinkhornTrainer adds it, times ``weight``, to ``divergence``, which compares row with row; calling this objective gives the
    transport alone. geometry "sample": each row by itself, C between tokens (``token_points``), masses are q and p on the union
    of their top k.

    The value of a group is that of a plan with mass one, counted once for each of its rows: sum / count is the mean over rows.
    ``normalize="sinkd"`` gives the plan mass n, the number of rows, as SinKD's code does; its losses are 0.001 (GLUE) or 0.0008
    of that value, so ``weight`` is 0.0008 there, of which 0.8 is the weight of its paper and our default on mass one. In the
    code the temperature is 2 whatever is asked for, and it goes wrong on sequences [B, S, V] (softmax over S): here rows are
    flattened, as the paper's batch of samples.

    Groups are made within a micro-batch: with ``group="batch"`` the loss depends on what else is in it, as any statistic of a
    batch does; with "sequence" it does not.

    epsilon: strength of the entropic term, in units of the cost. iterations: of rows, then columns; both at once, half the
    way, when ``debiased``. loss: "transport", sum P C with its gradient through the iterations, or "dual", the regularised
    value, with the plan held fixed (cheaper; exact once converged). debiased: the Sinkhorn divergence
    S(q, p) - (S(q, q) + S(p, p)) / 2, zero at p = q; needs full signals in geometry "batch", and three times the work.
    group: what is transported together, all rows of a micro-batch or those of each sequence. max_rows: of a larger group so
    many rows are drawn, in training from seed, step and sample. top_k: compare with each teacher row's K likeliest tokens and
    the mass outside (batch; all tokens when left out; dense student rows are then never kept beyond a chunk), or restrict q and
    p to so many tokens (sample; 32 when left out). token_cost, token_points: of geometry "sample", the distance between token
    vectors (cosine, sqeuclidean, l1), and whose they are: the teacher's or the student's input embeddings, "surface" (byte
    n-grams of the tokens' text), or a .safetensors file with one tensor [V, F].

    Options of the other geometry are not read. ValueError for options out of range and for ``debiased`` rows with ``top_k``;
    sampled signals cannot feed it.
    """

    epsilon: float = 0.1
    iterations: int = 20
    cost: Literal["l1", "sqeuclidean"] = "l1"
    temperature: float = 2.0
    geometry: Literal["batch", "sample"] = "batch"
    loss: Literal["transport", "dual"] = "transport"
    debiased: bool = False
    group: Literal["batch", "sequence"] = "batch"
    max_rows: int = 1024
    top_k: int | None = None
    token_cost: Literal["cosine", "sqeuclidean", "l1"] = "cosine"
    token_points: str = "teacher"
    normalize: Literal["mean", "sinkd"] = "mean"
    weight: float = 0.8
    divergence: RowObjective | None = field(default_factory=ForwardKL)

    def __post_init__(self) -> None:
        for name, least in (("epsilon", 0.0), ("temperature", 0.0)):
            if not getattr(self, name) > least:
                raise ValueError(f"Sinkhorn.{name} must be above {least:g}, not {getattr(self, name)}")
        for name, low in (("iterations", 1), ("max_rows", 2), ("top_k", 1), ("weight", 0)):
            if getattr(self, name) is not None and not getattr(self, name) >= low:
                raise ValueError(f"Sinkhorn.{name} must be at least {low}, not {getattr(self, name)}")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"Sinkhorn.{name} must be {' or '.join(known)}, not {getattr(self, name)!r}")
        if self.debiased and self.geometry == "batch" and self.top_k is not None:
            raise ValueError("a debiased Sinkhorn compares whole distributions: leave out top_k")
        if self.divergence is not None:
            check_divergence(self, self.divergence)
        elif self.geometry == "batch":
            raise ValueError("geometry batch is blind to the order of rows: it needs a divergence, such as ForwardKL")

    @property
    def accepts(self) -> Support | None:  # type: ignore[override]
        whole = Support.FULL if self.debiased and self.geometry == "batch" else Support.FULL | Support.TOPK
        own = None if self.divergence is None else self.divergence.accepts
        return shared_support([whole] if own is None else [whole, own])

    @property
    def same_vocabulary(self) -> bool:
        """Rows are compared token by token, so an id is one token in both models."""
        return True

    @property
    def tokens(self) -> int:
        """How many tokens of each side the sample-wise transport looks at."""
        return TOKENS if self.top_k is None else self.top_k

    def over(self, points: TokenPoints) -> SampleTransport:
        """The sample-wise transport with costs between these token vectors."""
        return SampleTransport(options=self, points=points)

    def solve(self, cost: Tensor, log_a: Tensor, log_b: Tensor) -> sinkhorn.Transported:
        """Sinkhorn's iterations as these options say."""
        return sinkhorn.sinkhorn(
            cost,
            log_a,
            log_b,
            epsilon=self.epsilon,
            iterations=self.iterations,
            loss=self.loss,
            symmetric=self.debiased,
        )

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None) -> Loss:
        """The batch-wise transport alone; ValueError for geometry "sample", which needs token vectors (``over``)."""
        self._check_batch()
        student, teacher = matched(student, teacher, self)
        assert teacher is not None
        if student.positions.weight is not None:
            raise ValueError("Sinkhorn moves rows of equal mass: positions with weights cannot be transported")
        groups = groups_of(student.positions, by=self.group, max_rows=self.max_rows)
        if not len(student.hidden):
            return Loss(sum=student.hidden.sum().float(), count=0)
        if groups.keep is not None:
            student, teacher = replace(student, hidden=student.hidden[groups.keep]), teacher.kept(groups.keep)
        return self._transported(groups, OfHead(student), teacher)

    def on_logits(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        mask: Tensor | None = None,
        points: TokenPoints | None = None,
    ) -> Loss:
        """The transport of given logits [..., V] by plain autograd, of the rows that ``labels`` and ``mask`` [...] leave.

        With ``group="sequence"`` the first axis of [B, S, V] is the sequence. ``points`` are the token vectors of geometry
        "sample". ValueError when nothing is scored, and as for row objectives.
        """
        if teacher_logits is None:
            raise ValueError("Sinkhorn compares two models: give teacher_logits")
        if self.geometry == "sample":
            if points is None:
                raise ValueError("geometry sample moves mass between tokens: give points, a TokenPoints")
            return self.over(points).on_logits(student_logits, teacher_logits, labels=labels, mask=mask)
        check_shapes(student_logits, teacher_logits, labels, mask)
        scored = scored_rows(student_logits, labels, mask)
        if not bool(scored.any()):
            raise ValueError("no row is scored: mask or labels leave out all of them")
        shared = min(student_logits.shape[-1], teacher_logits.shape[-1])
        q, p = (widened(logits[..., :shared][scored]) for logits in (student_logits, teacher_logits.detach()))
        sequence = scored.nonzero()[:, 0] if scored.ndim > 1 else torch.zeros_like(scored.nonzero()[:, 0])
        groups = groups_of(Positions(index=sequence, labels=sequence, sequence=sequence), by=self.group, max_rows=self.max_rows)
        if groups.keep is not None:
            q, p = q[groups.keep], p[groups.keep]
        return self._transported(groups, OfLogits(q), TeacherSignal(logits=p))

    def _check_batch(self) -> None:
        if self.geometry == "sample":
            raise ValueError(
                "geometry sample moves mass between tokens, whose vectors a trainer has: use SinkhornTrainer, or "
                "Sinkhorn(...).over(TokenPoints(...))"
            )

    def _transported(self, groups: Groups, student: StudentRows, teacher: TeacherSignal) -> Loss:
        with torch.autocast(student.device.type, enabled=False):  # which would round probabilities to 16 bits
            found = BatchTransport(self, groups, student=student, teacher=teacher)()
        values = torch.stack([one.value for one in found])
        counts = values.new_tensor(groups.counts)
        total = (counts * values * (counts if self.normalize == "sinkd" else 1.0)).sum()
        errors = (counts * torch.stack([one.marginal_error for one in found])).sum()
        rows = sum(groups.counts)
        metrics = {"sinkhorn": (total.detach(), rows), "sinkhorn_marginal_error": (errors, rows)}
        return Loss(sum=total, count=rows, metrics=metrics)


CHOICES = {
    "cost": ("l1", "sqeuclidean"),
    "geometry": ("batch", "sample"),
    "loss": ("transport", "dual"),
    "group": ("batch", "sequence"),
    "token_cost": ("cosine", "sqeuclidean", "l1"),
    "normalize": ("mean", "sinkd"),
}

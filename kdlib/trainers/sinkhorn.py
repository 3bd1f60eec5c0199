"""Distillation by optimal transport beside a divergence of rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.kernels import linear_objective
from kdlib.keys import draw_key
from kdlib.objectives import Sinkhorn
from kdlib.objectives.sinkhorn import TokenPoints
from kdlib.trainers.distillation import Batch, DistillationTrainer
from kdlib.trainers.token_points import check_token_points, token_points
from kdlib.types import Loss, Positions, StudentSignal, TeacherSignal


class SinkhornTrainer(DistillationTrainer):
    """A DistillationTrainer whose loss is mean(divergence) + weight * Sinkhorn, both over the same scored rows.

    objective: Sinkhorn, whose ``divergence`` (ForwardKL by default) compares row with row. Of a group with more than
    ``max_rows`` rows those that take part follow from seed, step and sample alone. With ``group="batch"`` a group is the rows
    of a process's micro-batch, so that the transport, and it alone, depends on how a step is cut into micro-batches.

    The log adds ``sinkhorn``, the mean transport without its weight, and ``divergence``; of the batch-wise transport
    ``sinkhorn_marginal_error`` too (0 once the iterations have converged).
    Raises ValueError for token vectors that cannot be had or are of another vocabulary; otherwise as its base class.
    """

    objective: Sinkhorn
    transports_rows = True

    def __init__(self, model: str | nn.Module, teacher: Any = None, *, objective: Any = None, **options: Any) -> None:
        objective = Sinkhorn() if objective is None else objective
        if not isinstance(objective, Sinkhorn):
            raise ValueError(f"SinkhornTrainer trains Sinkhorn, not {type(objective).__name__}: use DistillationTrainer")
        super().__init__(model, teacher, objective=objective, **options)
        self._points: TokenPoints | None = None
        if objective.geometry == "sample":
            self._points = token_points(
                objective.token_points,
                teacher=self.teacher,
                tokenizer=self.processing_class,
                vocab_size=self.vocab_size,
                device=self.accelerator.device,
            )
            check_token_points(objective.token_points, self.accelerator)

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """A number for each row of a step, by which large groups are thinned."""
        return [self._with_draws(batch, step=self.state.global_step + 1) for batch in super().prepare(batches)]

    def evaluation_batch(self, batch: Batch) -> Batch:
        """As in training, with the draws of step 0."""
        return self._with_draws(super().evaluation_batch(batch), step=0)

    def _with_draws(self, batch: Batch, *, step: int) -> Batch:
        where = batch.get("positions") or self.positions(batch)
        positions: Positions = where["distill"]
        if self.objective.geometry == "batch" and len(positions) > self.objective.max_rows:
            positions = replace(positions, uniform=_draws(positions, batch["sample_id"], seed=self.args.seed, step=step))
        return {**batch, "positions": {**where, "distill": positions}}

    def loss_of(self, student: StudentSignal, teacher: TeacherSignal | None) -> Loss:
        """Both sums over the rows, as one."""
        objective = self.objective
        transport = self._transport(student, teacher)
        found = {"sinkhorn": (transport.sum.detach(), transport.count), **transport.metrics}
        if objective.divergence is None:
            return replace(transport, sum=objective.weight * transport.sum, metrics=found if self._watching else {})
        rows = linear_objective(student, teacher, objective.divergence, metrics=self._watching)
        found |= {"divergence": (rows.sum.detach(), rows.count), **rows.metrics}
        total = rows.sum + objective.weight * transport.sum
        return Loss(sum=total, count=rows.count, metrics=found if self._watching else {})

    def _transport(self, student: StudentSignal, teacher: TeacherSignal | None) -> Loss:
        if self.objective.geometry == "batch":
            return self.objective(student, teacher)
        alone = self.objective.divergence is None and self._watching
        return linear_objective(student, teacher, self.objective.over(self._token_points()), metrics=alone)

    def _token_points(self) -> TokenPoints:
        """The token vectors; the student's own are those of this step."""
        if self._points is not None:
            return self._points
        model: Any = self.accelerator.unwrap_model(self.model)
        return TokenPoints(student=model.get_input_embeddings().weight.detach()[: self.vocab_size])


def _draws(positions: Positions, sample_id: Tensor, *, seed: int, step: int) -> Tensor:
    """[N]: the n-th scored row of a sample gets the n-th number of a generator keyed by (seed, step, sample)."""
    counts = torch.bincount(positions.sequence, minlength=len(sample_id)).tolist()
    drawn = [
        torch.rand(count, generator=torch.Generator().manual_seed(draw_key(seed, step, sample)))
        for count, sample in zip(counts, sample_id.tolist(), strict=True)
    ]
    return torch.cat(drawn).to(positions.index.device)

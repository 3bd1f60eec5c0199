"""Masked rows, tables of hidden states in the place of models, and a step's loss of them as a trainer adds it up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdlib.diffusion import Noise, Rows
from kdlib.diffusion.masking import Draws, Masking
from kdlib.objectives.diffusion import Corruption, DiffusionObjective, Scored
from kdlib.types import Head, Loss, Positions, StudentSignal, TeacherSignal

V, D = 7, 5
LENGTHS = ((2, 9), (1, 5), (3, 7))  # tokens of prompt and of response


def rows(lengths: tuple[tuple[int, int], ...] = LENGTHS, *, seed: int = 0) -> Rows:
    """Rows of random tokens with random commit steps, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    width = max(map(sum, lengths))
    column = torch.arange(width)
    ends = torch.tensor([sum(both) for both in lengths])[:, None]
    visible = column < ends
    maskable = visible & (column >= torch.tensor([prompt for prompt, _ in lengths])[:, None])
    return Rows(
        ids=torch.randint(0, V, maskable.shape, generator=generator) * visible,
        maskable=maskable,
        rank=torch.where(maskable, maskable.cumsum(1) - 1, -1),
        length=maskable.sum(1),
        commit_step=torch.randint(1, 5, maskable.shape, generator=generator) * maskable,
        visible=visible,
    )


def noise(kind: str = "uniform", *, tokens: Rows | None = None, seed: int = 3, **options: Any) -> Noise:
    """Noise in float64, so that its shares are no source of error."""
    tokens = tokens or rows()
    found = Draws.of(range(seed, seed + len(tokens.ids)), length=tokens.length)
    draws = Draws(row=found.row.double(), block=found.block.double(), token=found.token.double())
    return Masking(kind=kind, **{"block_length": 4, **options}).noise(tokens, draws, progress=0.25)


def one_row(of: Noise, row: int) -> Noise:
    """The noise of one row alone."""
    own = slice(row, row + 1)
    kept = {name: x[own] for name, x in vars(of.rows).items() if x is not None}
    return Noise(rows=Rows(**kept), **{name: x[own] for name, x in vars(of).items() if name != "rows"})


class Table:
    """A model that says something else on each view: hidden states [views, B, S, D] and a head [V, D], all random."""

    def __init__(self, views: int, shape: tuple[int, int], *, seed: int, scale: float = 1.5) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.hidden = scale * torch.randn(views, *shape, D, generator=generator, dtype=torch.float64)
        self.weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()

    @property
    def logits(self) -> Tensor:
        """[views, B, S, V]"""
        return self.hidden @ self.weight.T

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(loss, [self.hidden, self.weight], allow_unused=True)
        return tuple(torch.zeros_like(x) if g is None else g for g, x in zip(found, (self.hidden, self.weight), strict=True))


def student_signal(table: Table, scored: Scored, ids: Tensor) -> StudentSignal:
    row, column = scored.where.nonzero(as_tuple=True)
    weight = None if scored.weight is None else scored.weight[row, column]
    positions = Positions(index=column, labels=ids[row, column], sequence=row, weight=weight)
    return StudentSignal(hidden=table.hidden[scored.view, row, column], head=Head(weight=table.weight), positions=positions)


def teacher_signal(table: Table | None, scored: Scored) -> TeacherSignal | None:
    if scored.teacher is None or table is None:
        return None
    row, column = scored.where.nonzero(as_tuple=True)
    view = scored.teacher[row, column] if isinstance(scored.teacher, Tensor) else scored.teacher
    return TeacherSignal(hidden=table.hidden.detach()[view, row, column], head=Head(weight=table.weight.detach()))


def terms(
    objective: DiffusionObjective, corruption: Corruption, ids: Tensor, student: Table, teacher: Table | None = None
) -> dict[str, Loss]:
    """The terms of one micro-batch, counted as a trainer counts them."""
    read = {name: student_signal(student, scored, ids) for name, scored in corruption.scored.items()}
    told = {name: teacher_signal(teacher, scored) for name, scored in corruption.scored.items()}
    found = objective.terms(read, told)
    assert found.keys() == corruption.scored.keys()
    totals = {name: scored.total for name, scored in corruption.scored.items()}
    return {name: loss if totals[name] is None else replace(loss, count=totals[name]) for name, loss in found.items()}


def step_loss(objective: DiffusionObjective, micro_batches: list[dict[str, Loss]]) -> Tensor:
    """sum over terms of weight * sum_k / N_k, both over all micro-batches."""
    shares = [
        objective.weights.get(name, 1.0)
        * sum(batch[name].sum for batch in micro_batches)
        / max(1, sum(batch[name].count for batch in micro_batches))
        for name in micro_batches[0]
    ]
    return torch.stack([torch.as_tensor(share) for share in shares]).sum()


def loss_of(objective: DiffusionObjective, of: Noise, student: Table, teacher: Table | None = None) -> Tensor:
    """The loss of a step with one micro-batch."""
    return step_loss(objective, [terms(objective, objective.corrupt(of), of.rows.ids, student, teacher)])

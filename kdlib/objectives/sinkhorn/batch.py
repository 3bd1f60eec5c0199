"""Batch-wise transport: the rows of a group are points, student rows are moved onto teacher rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from kdlib.kernels import linear_rows
from kdlib.kernels.outcomes import top_k
from kdlib.kernels.sinkhorn import Transported
from kdlib.kernels.two_pass import RowValues
from kdlib.objectives.sinkhorn.costs import Outcomes, costs
from kdlib.objectives.sinkhorn.groups import Groups
from kdlib.types import DenseView, StudentSignal, TeacherSignal, View

if TYPE_CHECKING:
    from kdlib.objectives.sinkhorn.objective import Sinkhorn

CHUNK = 64  # rows of logits that become probabilities at a time


class StudentRows(Protocol):
    """The student at the rows that take part."""

    @property
    def device(self) -> torch.device: ...

    def values(self, row: RowValues, *, again: RowValues) -> Tensor:
        """``row`` of all rows, with the gradient of ``again``."""
        ...

    def view(self, rows: slice) -> DenseView:
        """Some rows, without gradient."""
        ...


@dataclass(frozen=True)
class OfHead:
    """Logits made of hidden states chunk by chunk, in forward and again in backward."""

    student: StudentSignal

    @property
    def device(self) -> torch.device:
        return self.student.hidden.device

    def values(self, row: RowValues, *, again: RowValues) -> Tensor:
        return linear_rows(self.student, row, again=again)

    @torch.no_grad()
    def view(self, rows: slice) -> DenseView:
        return DenseView(self.student.head(self.student.hidden[rows]))


@dataclass(frozen=True)
class OfLogits:
    """Logits [M, V] as they are."""

    logits: Tensor

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def values(self, row: RowValues, *, again: RowValues) -> Tensor:
        return row(DenseView(self.logits), slice(0, len(self.logits)))

    def view(self, rows: slice) -> DenseView:
        return DenseView(self.logits[rows].detach())


class BatchTransport:
    """The transport of every group, from the costs that ``student`` and ``teacher`` have with each other [M rows each]."""

    def __init__(self, options: Sinkhorn, groups: Groups, *, student: StudentRows, teacher: TeacherSignal) -> None:
        self.options, self.groups, self.where = options, groups, groups.slices()
        self.student, self.teacher = student, teacher
        self._points: tuple[int, Tensor | Outcomes, Tensor | None] | None = None

    def __call__(self) -> list[Transported]:
        """One for each group."""
        if 1 in self.groups.sizes:
            warnings.warn(
                "Sinkhorn: a group has one row, whose transport is no more than its distance from the teacher's row; "
                "make groups larger (group batch, more rows in a batch)",
                stacklevel=2,
            )
        found = self.student.values(self._costs, again=partial(self._costs, valued=False))
        return [self._transport(group, found[rows]) for group, rows in enumerate(self.where)]

    def _costs(self, q: DenseView, rows: slice, *, valued: bool = True) -> Tensor:
        """[n, J]: costs to the group's teacher rows, debiased then to its student rows; zeros up to the largest group's J."""
        x = q.at(self.options.temperature).logp.exp()
        width = max(self.groups.sizes) * (2 if self.options.debiased else 1)
        found = [
            self._group_costs(group, x[part.start - rows.start : part.stop - rows.start], valued=valued)
            for group, part in self.groups.parts(rows)
        ]
        return torch.cat([torch.nn.functional.pad(C, (0, width - C.shape[1])) for C in found])

    def _group_costs(self, group: int, x: Tensor, *, valued: bool) -> Tensor:
        teacher, own = self._points_of(group)
        found = [costs(x, points, self.options.cost, valued=valued) for points in (teacher, own) if points is not None]
        return found[0] if own is None else torch.cat(found, 1)

    @torch.no_grad()
    def _points_of(self, group: int) -> tuple[Tensor | Outcomes, Tensor | None]:
        """The group's teacher rows, and debiased its student rows; the last group's are remembered."""
        if self._points is None or self._points[0] != group:
            self._points = None  # before the next ones are made: both would be as large as a group's logits
            own = self._probabilities(self.student.view, self.where[group]) if self.options.debiased else None
            self._points = (group, self._teacher_points(self.where[group]), own)
        return self._points[1:]

    def _teacher_points(self, rows: slice) -> Tensor | Outcomes:
        if self.teacher.ids is None and self.options.top_k is None:
            return self._probabilities(self.teacher.view, rows)
        kept = [self._outcomes(self.teacher.view(chunk)) for chunk in _chunks(rows)]
        ids, p, rest = (torch.cat(parts) for parts in zip(*kept, strict=True))
        return Outcomes(ids=ids, p=p, rest=rest)

    def _outcomes(self, view: View) -> tuple[Tensor, Tensor, Tensor]:
        found = view.at(self.options.temperature)
        found = found if self.options.top_k is None else top_k(found, self.options.top_k)
        assert found.ids is not None
        return found.ids, found.logp.exp(), found.rest.exp()

    def _probabilities(self, view: Callable[[slice], View], rows: slice) -> Tensor:
        """[n, V], filled chunk by chunk: a softmax of all at once would need three of these."""
        made: Tensor | None = None
        for chunk in _chunks(rows):
            part = view(chunk).at(self.options.temperature).logp.exp()
            if made is None:
                made = part.new_empty(rows.stop - rows.start, part.shape[1])
            made[chunk.start - rows.start : chunk.stop - rows.start] = part
        assert made is not None
        return made

    def _transport(self, group: int, found: Tensor) -> Transported:
        n = self.groups.sizes[group]
        mixed = self._solved(found[:, :n])
        if not self.options.debiased:
            return mixed
        # student rows stand on both sides of their own costs, which are symmetric: the gradient to one side counts twice
        # (a row is at no distance from itself: rounding between its two projections would give L1 a slope of either sign there)
        own = found[:, n : 2 * n].masked_fill(torch.eye(n, dtype=torch.bool, device=found.device), 0.0)
        student = self._solved(2.0 * own - own.detach())
        with torch.no_grad():
            y = self._points_of(group)[0]
            assert isinstance(y, Tensor)
            teacher = self._solved(costs(y, y, self.options.cost))
        value = mixed.value - 0.5 * student.value - 0.5 * teacher.value
        return Transported(value=value, marginal_error=mixed.marginal_error)

    def _solved(self, cost: Tensor) -> Transported:
        mass = cost.new_full((len(cost),), -math.log(len(cost)))
        return self.options.solve(cost, mass, mass)


def _chunks(rows: slice) -> list[slice]:
    return [slice(start, min(start + CHUNK, rows.stop)) for start in range(rows.start, rows.stop, CHUNK)]

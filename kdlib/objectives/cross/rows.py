"""Some rows of a signal, and which rows of two tokenisations stand at the same place of their sequences."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdlib.head import accumulation_dtype
from kdlib.kernels.chunked import inputs_of
from kdlib.objectives.base import Objective
from kdlib.types import Positions, StudentSignal, TeacherSignal, feeds


def rows_of_student(student: StudentSignal, index: Tensor) -> StudentSignal:
    """The rows ``index`` [n], in that order and with gradients; their positions know of no chunks and no teacher's rows."""
    given = student.positions
    positions = Positions(
        index=given.index.index_select(0, index),
        labels=given.labels.index_select(0, index),
        sequence=given.sequence.index_select(0, index),
    )
    return replace(student, hidden=student.hidden.index_select(0, index), positions=positions)


def teacher_of(objective: Objective, teacher: TeacherSignal | None) -> TeacherSignal:
    """The teacher's signal; ValueError where there is none or it does not feed the objective."""
    name = type(objective).__name__
    if teacher is None:
        raise ValueError(f"{name} compares two models: give a teacher's signal")
    if not feeds(teacher.support, objective.accepts):
        raise ValueError(f"{name} accepts {objective.accepts}, the teacher gives {teacher.support}")
    return teacher


def sum_of_no_rows(student: StudentSignal) -> Tensor:
    """0, in the graph of the hidden states and the head, so that a loss without rows can be differentiated."""
    dtype = accumulation_dtype(student.hidden, student.head.weight)
    return torch.stack([x[:0].sum().to(dtype) for x in inputs_of(student) if x is not None]).sum()


def positional_pairs(positions: Positions) -> tuple[Tensor, Tensor]:
    """([M], [M]): the t-th row of a sequence beside the t-th of the teacher's rows, up to the shorter of the two.

    How many there are depends on the data, so that a device is waited for.
    """
    assert positions.other is not None
    mine, theirs = positions.sequence, positions.other.sequence
    order, other = mine.argsort(stable=True), theirs.argsort(stable=True)
    mine, theirs = mine[order], theirs[other]
    rank = torch.arange(len(mine), device=mine.device) - torch.searchsorted(mine, mine)
    start, stop = (torch.searchsorted(theirs, mine, right=right) for right in (False, True))
    kept = (rank < stop - start).nonzero()[:, 0]
    return order[kept], other[(start + rank)[kept]]

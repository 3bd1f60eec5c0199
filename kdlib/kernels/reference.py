"""The oracle: all logits at once and plain autograd, on any device and for any row objective."""

from __future__ import annotations

import torch

from kdlib.kernels.metrics import row_metrics, summed
from kdlib.types import DenseView, Loss, RowObjective, StudentSignal, TeacherSignal


def reference(student: StudentSignal, teacher: TeacherSignal | None, objective: RowObjective, metrics: bool) -> Loss:
    """sum_i w_i row_i with logits [N, V]; memory O(N V), gradients by autograd (also of higher order)."""
    q = DenseView(student.head(student.hidden), drawn=student.positions.drawn)
    with torch.no_grad():  # a teacher is a target, also where its head has parameters that ask for gradients
        p = None if teacher is None else teacher.view(slice(None))
    rows = objective.row(q, p, student.positions.labels)
    weight = student.positions.weight
    if weight is not None:
        rows = rows * weight.reshape(-1, *[1] * (rows.ndim - 1))
    return Loss(sum=rows.sum(0), count=len(rows), metrics=summed(row_metrics(q, p)) if metrics else {})

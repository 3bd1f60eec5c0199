"""Each row's loss by itself, for choices that are made before training on it; no gradient, no [N, V] logits."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kdlib.kernels.chunked import chunked_rows
from kdlib.kernels.matched import matched
from kdlib.types import RowObjective, StudentSignal, TeacherSignal


def row_values(student: StudentSignal, teacher: TeacherSignal | None, objective: RowObjective) -> Tensor:
    """row_i(q_i, p_i) of the N rows, [N] or [N, J], nats, in float32 or wider and without gradient; chunk by chunk.

    Weights of the positions are not applied. Vocabularies and errors are as in ``linear_objective``.
    """
    student, teacher = matched(student, teacher, objective)
    unweighted = replace(student, positions=replace(student.positions, weight=None))
    with torch.autocast(student.hidden.device.type, enabled=False):  # which would round logits to 16 bits
        return chunked_rows(unweighted, teacher, objective)

"""Linear layer + divergence in one call, without [N, V] logits.

``linear_objective`` has several implementations of one contract; ``reference`` is plain autograd and the oracle of the others.
``row_values`` gives the rows themselves, without gradient; ``linear_rows`` any values per row, with gradient.
"""

from __future__ import annotations

from typing import Literal

import torch

from kdlib.kernels.chunked import chunked
from kdlib.kernels.matched import matched
from kdlib.kernels.reference import reference
from kdlib.kernels.rows import row_values
from kdlib.kernels.two_pass import linear_rows
from kdlib.types import Loss, RowObjective, StudentSignal, TeacherSignal

__all__ = ["linear_objective", "linear_rows", "row_values"]

_IMPLEMENTATIONS = {"reference": reference, "chunked": chunked}


def linear_objective(
    student: StudentSignal,
    teacher: TeacherSignal | None,
    objective: RowObjective,
    *,
    impl: Literal["auto", "reference", "chunked"] = "auto",
    metrics: bool = False,
) -> Loss:
    """sum_i w_i row_i(q_i, p_i) over the N rows of ``student.positions``, with gradients to hidden states and head.

    ``Loss.sum`` is a scalar, or [J] when ``row`` gives [n, J]; ``Loss.count`` is N; ``metrics`` adds KL both ways, entropies,
    top-1 agreement and acceptance at temperature 1. Vocabularies padded to different sizes are both cut to the smaller before
    the softmax, unless the objective compares different vocabularies; then there are no metrics.
    Raises ValueError when the teacher's support does not feed the objective or the row counts differ.
    """
    if impl != "auto" and impl not in _IMPLEMENTATIONS:
        raise ValueError(f"impl={impl!r}: choose auto, {' or '.join(_IMPLEMENTATIONS)}")
    student, teacher = matched(student, teacher, objective)
    metrics = metrics and objective.same_vocabulary
    with torch.autocast(student.hidden.device.type, enabled=False):  # which would round logits and gradients to 16 bits
        return _IMPLEMENTATIONS["chunked" if impl == "auto" else impl](student, teacher, objective, metrics)

"""Linear layer + any values per row, whose upstream gradient is known only later: chunks are projected a second time.

Peak memory is that of the chunk's logits and what ``row`` makes of them; [N, V] is never built.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdlib.kernels.chunked import Gradients, Job, inputs_of, run
from kdlib.types import DenseView, StudentSignal, View

RowValues = Callable[[DenseView, slice], Tensor]


def linear_rows(student: StudentSignal, row: RowValues, *, again: RowValues | None = None) -> Tensor:
    """``row(q, rows)`` of all N rows, [N] or [N, J], with gradients to hidden states and head for any upstream gradient.

    ``q`` is the student at the rows that the slice ``rows`` of 0..N-1 names, a chunk at a time. ``linear_objective`` is
    cheaper where the rows are summed. ``row`` runs again in backward and must have the same gradient there; ``again`` takes its
    place where the gradient is cheaper without the values. Weights of the positions are not applied. Differentiable once. N
    must be above 0.
    """
    assert len(student.hidden), "no row, so that the number of values of a row is not known"
    with torch.autocast(student.hidden.device.type, enabled=False):  # which would round logits to 16 bits
        return _TwoPass.apply(*inputs_of(student), student, row, again or row)


class _TwoPass(torch.autograd.Function):
    """Inputs (hidden, weight, bias, A, B, student, row, again) -> rows."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *_, student, row, again = inputs
        ctx.student, ctx.row = student, again
        _, values = run(_job(student, row), Gradients((False,) * 5, [None] * 5), False)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.student is None:
            raise RuntimeError("the rows are differentiable once: call linear_rows again")
        student, row, needed = ctx.student, ctx.row, ctx.needs_input_grad[:5]
        ctx.student = ctx.row = None  # what they hold is as large as the models' logits

        def pulled(q: DenseView, rows: slice) -> Tensor:
            values = row(q, rows) * upstream[rows]
            return values if values.ndim == 1 else values.flatten(1).sum(-1)

        with torch.autocast(student.hidden.device.type, enabled=False):
            gradients, _ = run(_job(student, pulled), Gradients(needed, inputs_of(student)), True)
        stored = gradients.stored()
        return (*(stored.pop(0)[0] if need else None for need in needed), None, None, None)


def _job(student: StudentSignal, row: RowValues) -> Job:
    def of_rows(q: DenseView, p: View | None, rows: slice) -> Tensor:
        return row(q, rows)

    return Job(student=student, teacher=None, row=of_rows, large_blocks=True)

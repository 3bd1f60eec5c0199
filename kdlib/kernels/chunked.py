"""Single-pass linear objective: every chunk of rows is projected once per model; loss and gradient are taken at once.

Backward recomputes nothing: it scales the stored gradients by the upstream scalar. Peak memory is about 2 c V floats for the
chunk's logits, V D for grad_weight and N D for grad_hidden (none of the latter for what needs no gradient).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdlib.head import Head, accumulation_dtype, wide_matmul
from kdlib.kernels.metrics import row_metrics, summed
from kdlib.types import DenseView, Loss, RowObjective, StudentSignal, TeacherSignal, View

# On CPU elementwise work runs on a few rows at a time, which stay in cache; below 256 rows the matrix products lose speed.
CPU_CHUNK, CPU_BLOCK_BYTES, CPU_LARGE_BLOCK = 256, 2**19, 64
GPU_CHUNK_BYTES = 2**30


def chunked(student: StudentSignal, teacher: TeacherSignal | None, objective: RowObjective, metrics: bool) -> Loss:
    """``linear_objective`` by chunks, for any row objective on any device; differentiable once."""
    job = _job(student, teacher, objective, metrics=metrics)
    sums = _SinglePass.apply(*inputs_of(student), job)
    return Loss(sum=sums, count=len(student.hidden), metrics=summed({k: torch.cat(v) for k, v in job.found.items()}))


def inputs_of(student: StudentSignal) -> list[Tensor | None]:
    """What gradients go to: hidden states, the head's weight and bias, and its LoRA pair."""
    head = student.head
    lora_a, lora_b, _ = head.lora or (None, None, 0.0)
    return [student.hidden, head.weight, head.bias, lora_a, lora_b]


def chunked_rows(student: StudentSignal, teacher: TeacherSignal | None, objective: RowObjective) -> Tensor:
    """The rows [N] or [N, J] that ``chunked`` sums, weights applied, without gradient."""
    job = _job(student, teacher, objective, metrics=False)
    _, rows = run(job, Gradients((False,) * 5, [None] * 5), False)
    return rows


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is computed of each chunk: ``row(q, p, rows)`` gives [n] or [n, J] of the rows that a slice of 0..N names.

    ``large_blocks``: on CPU ``row`` sees 64 rows at a time instead of the few that stay in cache. ``metrics`` are collected
    into ``found``.
    """

    student: StudentSignal
    teacher: TeacherSignal | None
    row: Callable[[DenseView, View | None, slice], Tensor]
    large_blocks: bool = False
    metrics: bool = False
    found: dict[str, list[Tensor]] = field(default_factory=dict)


def _job(student: StudentSignal, teacher: TeacherSignal | None, objective: RowObjective, *, metrics: bool) -> Job:
    """The objective's rows, each times its weight."""
    labels, weight = student.positions.labels, student.positions.weight

    def row(q: DenseView, p: View | None, rows: slice) -> Tensor:
        values = objective.row(q, p, labels[rows])
        return values if weight is None else values * weight[rows].reshape(-1, *[1] * (values.ndim - 1))

    return Job(student=student, teacher=teacher, row=row, large_blocks=objective.large_blocks, metrics=metrics)


class _SinglePass(torch.autograd.Function):
    """Inputs (hidden, weight, bias, A, B, job) -> sums; gradients are made in forward for the inputs that need one."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *tensors, job = inputs
        needed = ctx.needs_input_grad[:5]
        gradients, rows = run(job, Gradients(needed, tensors), any(needed))
        ctx.scalar = rows.ndim == 1
        # not save_for_backward: it would keep a second reference, and autograd copies what it cannot take over as .grad
        ctx.gradients = gradients.stored()
        return rows.sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the stored gradients were handed out: call backward once, or linear_objective again")
        scalars = [upstream] if ctx.scalar else list(upstream)
        stored, ctx.gradients = ctx.gradients, None
        found = [_scaled(stored.pop(0), scalars) if need else None for need in ctx.needs_input_grad[:5]]
        return (*found, None)


def _scaled(gradients: list[Tensor], scalars: list[Tensor]) -> Tensor:
    """sum_j scalar_j gradient_j, in place: a gradient is as large as the head. Empties the list, so that no reference stays."""
    total = gradients.pop(0).mul_(scalars[0])
    for scalar in scalars[1:]:
        total += gradients.pop(0).mul_(scalar)
    return total


class Gradients:
    """float32 accumulators for each needed input, one per sum; made when the first chunk tells how many sums there are."""

    def __init__(self, needed: tuple[bool, ...], tensors: list[Tensor | None]) -> None:
        self.needed, self.tensors, self.made = needed, tensors, [[] for _ in needed]  # type: ignore[var-annotated]

    def make(self, sums: int, dtype: torch.dtype) -> None:
        for slot, need, tensor in zip(self.made, self.needed, self.tensors, strict=True):
            if need and not slot and tensor is not None:
                slot.extend(torch.zeros(tensor.shape, dtype=dtype, device=tensor.device) for _ in range(sums))

    def stored(self) -> list[list[Tensor]]:
        return [slot for slot in self.made if slot]

    def add(self, j: int, chunk: slice, dz: Tensor, hidden: Tensor, head: Head) -> None:
        """Adds what the chunk's d sum_j / d projected-logits [n, V] gives to each input: five products at most."""
        grad_hidden, grad_weight, grad_bias, grad_a, grad_b = (slot[j] if slot else None for slot in self.made)
        if grad_weight is not None:
            grad_weight.addmm_(dz.T, hidden.to(dz.dtype)) if not dz.is_cuda else grad_weight.add_(_product(dz.T, hidden))
        if grad_bias is not None:
            grad_bias.add_(dz.sum(0))
        if grad_hidden is not None:
            grad_hidden[chunk] = _product(dz, head.weight)
        if head.lora is None:
            return
        a, b, s = head.lora
        through_b = s * _product(dz, b)
        if grad_hidden is not None:
            grad_hidden[chunk] += _product(through_b, a)
        if grad_a is not None:
            grad_a.add_(_product(through_b.T, hidden))
        if grad_b is not None:
            grad_b.add_(s * _product(dz.T, wide_matmul(hidden.to(a.dtype), a.T)))


def _product(dz: Tensor, other: Tensor) -> Tensor:
    """A gradient times a weight or activation; on CUDA in the 16-bit type of ``other``, accumulated in float32."""
    return wide_matmul(dz.to(other.dtype) if dz.is_cuda and other.dtype.itemsize == 2 else dz, other)


@torch.no_grad()
def run(job: Job, gradients: Gradients, differentiate: bool) -> tuple[Gradients, Tensor]:
    """The rows [N] or [N, J] of all chunks, and with ``differentiate`` the gradients of their sums added to ``gradients``."""
    hidden, head = job.student.hidden, _ready(job.student.head, job.student.hidden)
    teacher = None if job.teacher is None else job.teacher.with_heads(_ready)
    collected: list[Tensor] = []
    buffers = _buffers(min(chunk_rows(hidden, head), len(hidden)), head, teacher, hidden)
    for chunk in _slices(len(hidden), chunk_rows(hidden, head)):
        here, there = (None if b is None else b[: chunk.stop - chunk.start] for b in buffers)
        projected = head.project(hidden[chunk], out=here)
        view = None if teacher is None else teacher.view(chunk, out=there)
        rows, dz = _chunk_rows_and_gradient(job, projected, view, chunk, differentiate)
        collected.append(rows)
        gradients.make(len(dz), projected.dtype)
        for j, dz_j in enumerate(dz):
            gradients.add(j, chunk, dz_j, hidden[chunk], head)
    if not collected:
        empty = accumulation_dtype(hidden, head.weight)
        gradients.make(1, empty)
        return gradients, hidden.new_zeros(0, dtype=empty)
    return gradients, torch.cat(collected)


def _chunk_rows_and_gradient(
    job: Job, projected: Tensor, teacher: View | None, chunk: slice, differentiate: bool
) -> tuple[Tensor, list[Tensor]]:
    """The chunk's weighted rows [n] or [n, J] and d rows_j / d projected for each j; the last is written over ``projected``."""
    collected: Tensor | None = None
    dz: list[Tensor] = []
    for block in _slices(len(projected), _block_rows(projected, large=job.large_blocks)):
        rows = slice(chunk.start + block.start, chunk.start + block.stop)
        p = None if teacher is None else teacher[block]
        values, gradients = _block_rows_and_gradient(job, projected[block], p, rows, differentiate)
        if collected is None:  # one tensor: small ones kept from every block would pin the heap between the blocks' temporaries
            collected = values.new_empty(len(projected), *values.shape[1:])
        collected[block] = values
        if not dz and gradients:
            dz = [torch.empty_like(projected) for _ in gradients[1:]] + [projected]
        for whole, of_block in zip(dz, gradients, strict=True):
            whole[block] = of_block
    assert collected is not None
    return collected, dz


def _block_rows_and_gradient(
    job: Job, projected: Tensor, p: View | None, rows: slice, differentiate: bool
) -> tuple[Tensor, list[Tensor]]:
    """The same for one block, by autograd; a function of its own so that nothing of a block outlives it."""
    drawn = job.student.positions.drawn
    with torch.enable_grad():
        raw = projected.detach().requires_grad_(differentiate)
        q = DenseView(job.student.head.finish(raw), drawn=None if drawn is None else drawn[rows])
        values = job.row(q, p, rows)
        sums = [values] if values.ndim == 1 else list(values.unbind(-1))
    if job.metrics:
        for name, found in row_metrics(q, p).items():
            job.found.setdefault(name, []).append(found)
    if not differentiate:
        return values, []
    ones = torch.ones_like(sums[0])
    return values.detach(), [torch.autograd.grad(s, raw, ones, retain_graph=s is not sums[-1])[0] for s in sums]


def _ready(head: Head, hidden: Tensor) -> Head:
    """The head with its weight cast once instead of once a chunk: to the autocast type, and on CPU to the accumulation type."""
    weight = head.weight if head.dtype is None else head.weight.to(head.dtype)
    if not weight.is_cuda:
        weight = weight.to(accumulation_dtype(hidden, weight))
    return replace(head, weight=weight)


def _buffers(rows: int, head: Head, teacher: TeacherSignal | None, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The two [c, V] buffers that all chunks share on CPU, where fresh pages cost time; CUDA's allocator reuses its own."""
    if hidden.is_cuda:
        return None, None
    mine = torch.empty(rows, head.out_features, dtype=accumulation_dtype(hidden, head.weight))
    if teacher is None or teacher.head is None or teacher.hidden is None:
        return mine, None
    return mine, torch.empty(rows, teacher.head.out_features, dtype=accumulation_dtype(teacher.hidden, teacher.head.weight))


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def chunk_rows(hidden: Tensor, head: Head) -> int:
    """How many rows are projected at a time: the c of the memory formula."""
    if not hidden.is_cuda:
        return CPU_CHUNK
    rows = GPU_CHUNK_BYTES // (8 * head.out_features)
    return max(256, min(4096, rows // 256 * 256))


def _block_rows(projected: Tensor, *, large: bool) -> int:
    if projected.is_cuda:
        return len(projected)
    if large:
        return CPU_LARGE_BLOCK
    return max(1, CPU_BLOCK_BYTES // (projected.shape[-1] * projected.element_size()))

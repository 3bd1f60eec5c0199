"""Costs between distributions over the vocabulary, without an [n, m, V] intermediate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Cost = Literal["l1", "sqeuclidean"]
GATHERED = 2**24  # elements of student probabilities gathered at a time
CUDA_BUFFER = 2**26  # elements that the derivative of a distance may hold at once


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """m teacher rows, each over K tokens of its own: ``ids`` and probabilities ``p`` [m, K], and the mass outside [m]."""

    ids: Tensor
    p: Tensor
    rest: Tensor


def costs(x: Tensor, y: Tensor | Outcomes, cost: Cost, *, valued: bool = True) -> Tensor:
    """C [n, m] between probabilities x [n, V] and teacher rows: sum_v |x_iv - y_jv| or sum_v (x_iv - y_jv)^2.

    On ``Outcomes`` the sum is over the K + 1 outcomes of teacher row j: for L1 a lower bound of the dense cost, rising with K.
    Where only the gradient is wanted (``valued`` false), dense L1 costs are zeros, and cost a quarter.
    """
    if isinstance(y, Outcomes):
        return _on_outcomes(x, y, cost)
    y = y.to(x.dtype)
    if cost == "l1":
        return _L1.apply(x, y, valued)
    return torch.addmm((x * x).sum(-1)[:, None] + (y * y).sum(-1), x, y.mT, alpha=-2.0)


class _L1(torch.autograd.Function):
    """torch.cdist(x, y, p=1) with a derivative to x alone; on CUDA taken by blocks, because there it holds [m, n, V]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, valued: bool) -> Tensor:
        found = torch.cdist(x, y, p=1.0) if valued else x.new_zeros(len(x), len(y))
        ctx.save_for_backward(x, y, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        x, y, found = ctx.saved_tensors
        width = max(1, CUDA_BUFFER // found.numel()) if x.is_cuda else x.shape[1]
        parts = [
            torch.ops.aten._cdist_backward(upstream.contiguous(), a.contiguous(), b.contiguous(), 1.0, found)
            for a, b in zip(x.split(width, 1), y.split(width, 1), strict=True)
        ]
        return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)), None, None


def _on_outcomes(x: Tensor, y: Outcomes, cost: Cost) -> Tensor:
    rows = max(1, GATHERED // (len(x) * y.ids.shape[1]))
    blocks = zip(y.ids.split(rows), y.p.split(rows), y.rest.split(rows), strict=True)
    found = [checkpoint(_outcome_block, x, *block, cost, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return found[0] if len(found) == 1 else torch.cat(found, 1)


def _outcome_block(x: Tensor, ids: Tensor, p: Tensor, rest: Tensor, cost: Cost) -> Tensor:
    """C [n, m'] on the outcomes of m' teacher rows."""
    inside = x.gather(1, ids.reshape(1, -1).expand(len(x), -1)).view(len(x), *ids.shape)
    gap, outside = inside - p, (1.0 - inside.sum(-1)) - rest
    if cost == "l1":
        return gap.abs().sum(-1) + outside.abs()
    return (gap * gap).sum(-1) + outside * outside

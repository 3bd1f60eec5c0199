"""Sinkhorn distillation once more: whole logits of single rows, plans made of probabilities, a loop over groups, autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.keys import draw_key
from kdlib.objectives import Sinkhorn
from tests.trainers.small import PlainLoss, V

Row = Mapping[str, Any]
Keep = Callable[[Row, int], Tensor]  # (row, number of its scored tokens) -> the number of [0, 1) that each draws


@dataclass(frozen=True, kw_only=True)
class Transported:
    """Means over all scored tokens; ``error``: how far the plans are from their marginals."""

    value: Tensor
    error: float


def plain_transport(
    student: nn.Module,
    teacher: nn.Module,
    groups: Iterable[Sequence[Row]],
    options: Sinkhorn,
    *,
    points: Tensor | None = None,
    draws: Keep | None = None,
) -> Transported:
    """The transport of each group of rows, counted once for every scored token in it."""
    total, errors, count = torch.zeros((), dtype=torch.float64), 0.0, 0
    for group in groups:
        said = [_said(student, teacher, row) for row in group]
        q, p = (torch.cat(logits) / options.temperature for logits in zip(*said, strict=True))
        n = len(q)
        if options.geometry == "sample":
            assert points is not None
            value, error = _of_tokens(q, p, points, options), 0.0
        else:
            drawn = [draws(row, len(one[0])) for row, one in zip(group, said, strict=True)] if draws else None
            kept = slice(None) if drawn is None else torch.cat(drawn).argsort()[: options.max_rows].sort().values
            mean, error = _of_rows(q[kept].softmax(-1), p[kept].softmax(-1), options)
            value = n * mean * (n if options.normalize == "sinkd" else 1)
        total, errors, count = total + value, errors + n * error, count + n
    return Transported(value=total / count, error=errors / count)


def draws_of(*, seed: int, step: int) -> Keep:
    """What a row draws in a step."""

    def drawn(row: Row, count: int) -> Tensor:
        return torch.rand(count, generator=torch.Generator().manual_seed(draw_key(seed, step, row["sample_id"])))

    return drawn


def tempered(loss: PlainLoss, temperature: float) -> PlainLoss:
    """The loss of both distributions at a temperature."""

    def found(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
        return loss((p / temperature).log_softmax(-1), (q / temperature).log_softmax(-1), labels)

    return found


def _said(student: nn.Module, teacher: nn.Module, row: Row) -> tuple[Tensor, Tensor]:
    """Logits [n, V] of both models at the scored tokens of one unpadded row."""
    ids, scored = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
    q = student(input_ids=ids).logits[0, :-1, :V][scored]
    with torch.no_grad():
        return q, teacher(input_ids=ids).logits[0, :-1, :V][scored]


def _of_rows(x: Tensor, y: Tensor, options: Sinkhorn) -> tuple[Tensor, float]:
    """(value, marginal error) of moving the distributions x [n, V] onto y [n, V]."""
    mass = torch.full((len(x),), 1 / len(x), dtype=torch.float64)
    value, error = _moved(_distances(x, y, options), mass, mass, options)
    if options.debiased:
        both = [_moved(_distances(z, z, options), mass, mass, options)[0] for z in (x, y)]
        value = value - sum(both) / 2
    return value, error


def _distances(x: Tensor, y: Tensor, options: Sinkhorn) -> Tensor:
    """C [n, m], a column for each teacher row; with top_k of its likeliest tokens and one for all others."""
    columns = []
    for row in y:
        a, b = x, row
        if options.top_k is not None:
            ids = row.argsort(descending=True)[: options.top_k]
            a, b = (torch.cat([z[..., ids], 1 - z[..., ids].sum(-1, keepdim=True)], -1) for z in (x, row))
        columns.append((a - b).abs().sum(-1) if options.cost == "l1" else (a - b).square().sum(-1))
    return torch.stack(columns, 1)


def _of_tokens(q: Tensor, p: Tensor, points: Tensor, options: Sinkhorn) -> Tensor:
    """The sum over rows of moving q's mass onto p's, both on the union of their top k and renormalised there."""
    k, total = 32 if options.top_k is None else options.top_k, torch.zeros((), dtype=torch.float64)
    for one, other in zip(q, p, strict=True):
        union = sorted({*one.argsort(descending=True)[:k].tolist(), *other.argsort(descending=True)[:k].tolist()})
        a, b, cost = one[union].softmax(-1), other[union].softmax(-1), _between(points[union].double(), options)
        value = _moved(cost, a, b, options)[0]
        if options.debiased:
            value = value - (_moved(cost, a, a, options)[0] + _moved(cost, b, b, options)[0]) / 2
        total = total + value
    return total


def _between(vectors: Tensor, options: Sinkhorn) -> Tensor:
    """C [u, u] between token vectors [u, F], each of length one."""
    if options.token_cost == "l1":
        unit = vectors / vectors.abs().sum(-1, keepdim=True)
        return (unit[:, None] - unit).abs().sum(-1)
    unit = vectors / vectors.square().sum(-1, keepdim=True).sqrt()
    squared = (unit[:, None] - unit).square().sum(-1)
    return squared if options.token_cost == "sqeuclidean" else squared / 2


def _moved(cost: Tensor, a: Tensor, b: Tensor, options: Sinkhorn) -> tuple[Tensor, float]:
    """(value, marginal error) of the plan diag(a u) K diag(b v), K = exp(-C / epsilon), whose gradient goes through u and v."""
    kernel, u, v = (-cost / options.epsilon).exp(), torch.ones_like(a), torch.ones_like(b)
    for _ in range(options.iterations):
        if options.debiased:
            u, v = (u / (kernel @ (b * v))).sqrt(), (v / ((a * u) @ kernel)).sqrt()
        else:
            u = 1 / (kernel @ (b * v))
            v = 1 / ((a * u) @ kernel)
    if options.loss == "dual":
        u, v = u.detach(), v.detach()
    plan = (a * u)[:, None] * kernel * (b * v)
    error = ((plan.sum(1) - a).abs().sum() + (plan.sum(0) - b).abs().sum()).item()
    if options.loss == "dual":
        return options.epsilon * (a @ u.log() + b @ v.log() - plan.sum() + 1), error
    return (plan * cost).sum(), error

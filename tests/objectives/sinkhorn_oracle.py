"""Sinkhorn distillation once more: loops over plain Python floats, and the same formula in torch for its gradient.

Both scale exp(-C / epsilon) outside the log domain, which double precision allows for epsilon of 0.05 and more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from kdlib.objectives import Sinkhorn
from tests.objectives import oracle

Row = Sequence[float]
Matrix = Sequence[Row]


# Values in loops ----------------------------------------------------------------------------------


def batch(options: Sinkhorn, students: Matrix, teachers: Matrix, *, sequence: Sequence[int] | None = None) -> float:
    """``Loss.sum`` of the batch geometry: of each group its transport times its rows (squared with normalize="sinkd")."""
    sequence = [0] * len(students) if sequence is None or options.group == "batch" else sequence
    total = 0.0
    for _, group in groupby(range(len(students)), key=lambda i: sequence[i]):
        rows = list(group)
        x, y = ([oracle.softmax(z[i], options.temperature) for i in rows] for z in (students, teachers))
        mass = len(rows) ** 2 if options.normalize == "sinkd" else len(rows)
        total += mass * transport(options, x, y)
    return total


def transport(options: Sinkhorn, x: Matrix, y: Matrix) -> float:
    """The loss of one group of distributions."""
    value = moved(options, costs(options, x, y))
    if not options.debiased:
        return value
    return value - 0.5 * moved(options, costs(options, x, x)) - 0.5 * moved(options, costs(options, y, y))


def costs(options: Sinkhorn, x: Matrix, y: Matrix) -> list[list[float]]:
    return [[distance(options, a, b) for b in y] for a in x]


def distance(options: Sinkhorn, a: Row, b: Row) -> float:
    """Between student row a and teacher row b, on the K + 1 outcomes of b where there is a top_k."""
    if options.top_k is not None:
        ids = oracle.best(b, options.top_k)
        a, b = oracle.coarse(a, ids), oracle.coarse(b, ids)
    power = 1 if options.cost == "l1" else 2
    return math.fsum(abs(p - q) ** power for p, q in zip(a, b, strict=True))


def moved(options: Sinkhorn, C: Matrix, a: Row | None = None, b: Row | None = None) -> float:
    """What moving ``a`` onto ``b`` (equal masses when left out) at costs C comes to after the iterations."""
    n, m, e = len(C), len(C[0]), options.epsilon
    a, b = [1 / n] * n if a is None else a, [1 / m] * m if b is None else b
    K = [[math.exp(-c / e) for c in row] for row in C]
    u, v = [1.0] * n, [1.0] * m  # exp(f / epsilon) and exp(g / epsilon)
    for _ in range(options.iterations):
        over_columns = [1 / math.fsum(K[i][j] * b[j] * v[j] for j in range(m)) for i in range(n)]
        start = u if options.debiased else over_columns
        over_rows = [1 / math.fsum(K[i][j] * a[i] * start[i] for i in range(n)) for j in range(m)]
        half = options.debiased  # half of both steps at once, which is a geometric mean of the scalings
        u = [math.sqrt(s * t) if half else t for s, t in zip(u, over_columns, strict=True)]
        v = [math.sqrt(s * t) if half else t for s, t in zip(v, over_rows, strict=True)]
    P = [[a[i] * u[i] * K[i][j] * b[j] * v[j] for j in range(m)] for i in range(n)]
    if options.loss == "transport":
        return math.fsum(P[i][j] * C[i][j] for i in range(n) for j in range(m))
    potentials = math.fsum(p * math.log(s) for p, s in zip([*a, *b], [*u, *v], strict=True))
    return e * (potentials - math.fsum(map(math.fsum, P)) + 1.0)


def sinkd(students: Matrix, teachers: Matrix) -> float:
    """SinKD's batch loss before its factor of 0.001 or 0.0008 (arXiv 2402.17110; T 2, epsilon 0.1, 20 iterations)."""
    x, y = ([oracle.softmax(z, 2.0) for z in rows] for rows in (students, teachers))
    n = range(len(x))
    W = [[math.fsum(abs(p - q) for p, q in zip(x[i], y[j], strict=True)) for j in n] for i in n]
    P = [[math.exp(-W[i][j] / 0.1) for j in n] for i in n]
    for _ in range(20):
        rows = [math.fsum(P[i]) for i in n]
        P = [[P[i][j] / rows[i] for j in n] for i in n]
        columns = [math.fsum(P[i][j] for i in n) for j in n]
        P = [[P[i][j] / columns[j] for j in n] for i in n]
    return math.fsum(P[i][j] * W[i][j] for i in n for j in n)


# The same in torch, for autograd ------------------------------------------------------------------


def plain_batch(options: Sinkhorn, student: Tensor, teacher: Tensor) -> Tensor:
    """The transport of one group of logits [n, V], without the number of rows; memory [n, n, V]."""
    x, y = ((z / options.temperature).softmax(-1) for z in (student, teacher))
    value = plain_moved(options, plain_costs(options, x, y))
    if not options.debiased:
        return value
    return (
        value - 0.5 * plain_moved(options, plain_costs(options, x, x)) - 0.5 * plain_moved(options, plain_costs(options, y, y))
    )


def plain_costs(options: Sinkhorn, x: Tensor, y: Tensor) -> Tensor:
    gap = x[:, None] - y[None, :]
    if options.top_k is not None:
        ids = y.topk(options.top_k, dim=-1).indices.expand(len(x), -1, -1)
        inside = gap.gather(-1, ids)
        gap = torch.cat([inside, -inside.sum(-1, keepdim=True)], -1)
    return gap.abs().sum(-1) if options.cost == "l1" else gap.square().sum(-1)


def plain_moved(options: Sinkhorn, C: Tensor, a: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """``moved`` of one problem [n, m]; potentials of the dual are held fixed, as an envelope's are."""
    a = C.new_full((C.shape[0],), 1 / C.shape[0]) if a is None else a
    b = C.new_full((C.shape[1],), 1 / C.shape[1]) if b is None else b
    with torch.set_grad_enabled(options.loss == "transport"):
        u, v = _scalings(options, (-C / options.epsilon).exp(), a, b)
    P = (a * u)[:, None] * (-C / options.epsilon).exp() * (b * v)
    if options.loss == "transport":
        return (P * C).sum()
    return options.epsilon * ((a * u.log()).sum() + (b * v.log()).sum() - P.sum() + 1.0)


def _scalings(options: Sinkhorn, K: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    u, v = torch.ones_like(a), torch.ones_like(b)
    for _ in range(options.iterations):
        over_columns = 1 / (K @ (b * v))
        if options.debiased:
            u, v = (u * over_columns).sqrt(), (v / (K.T @ (a * u))).sqrt()
        else:
            u, v = over_columns, 1 / (K.T @ (a * over_columns))
    return u, v

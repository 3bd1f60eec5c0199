"""Sample-wise transport: the tokens of one row are points, the student's mass is moved onto the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kdlib.kernels.sinkhorn import Transported
from kdlib.objectives.base import RowObjective
from kdlib.types import LogProbs, Support, View

if TYPE_CHECKING:
    from kdlib.objectives.sinkhorn.objective import Sinkhorn

TokenCost = Literal["cosine", "sqeuclidean", "l1"]
GATHERED = 2**24  # elements of token vectors gathered at a time


@dataclass(frozen=True, kw_only=True)
class TokenPoints:
    """A vector for each token: ``student`` [V, F] of the student's vocabulary, ``teacher`` [V', F] of the teacher's, None where
    both have one vocabulary.
    """

    student: Tensor
    teacher: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SampleTransport(RowObjective):
    """Sinkhorn's transport between q and p restricted to the union of their top-k tokens, both renormalised on it; a row each.

    The cost between two tokens is the distance of their vectors: 1 - cosine, squared Euclidean (of unit vectors), or L1 (of
    vectors with L1 norm 1). With two vocabularies q is restricted to its own top k and p to its own. Made by
    ``Sinkhorn.over``, whose options it reads. Tokens of which a top-k teacher says nothing have no mass in p.
    Raises ValueError where a vocabulary is larger than its token vectors.
    """

    options: Sinkhorn
    points: TokenPoints

    accepts = Support.FULL | Support.TOPK

    @property
    def same_vocabulary(self) -> bool:
        return self.points.teacher is None

    @property
    def large_blocks(self) -> bool:
        return True

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        assert p is not None
        student, teacher = q.at(self.options.temperature), p.at(self.options.temperature)
        self._check(student, teacher)
        a, b = _top(student, self.options.tokens), _top(teacher, self.options.tokens)
        if self.points.teacher is not None:
            return self._transported(student, teacher, _all(a), _all(b))
        both = _union(b, a)
        return self._transported(student, teacher, both, both)

    def _transported(self, student: LogProbs, teacher: LogProbs, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        """Loss [n] of the student's mass on tokens ``a`` (ids, and which of them count, [n, u]) and the teacher's on ``b``."""
        log_a, log_b = _restricted(student, *a), _restricted(teacher, *b)
        x = self.points.student
        y = x if self.points.teacher is None else self.points.teacher
        value = self._solved((x, a[0]), (y, b[0]), log_a, log_b).value
        if not self.options.debiased:
            return value
        own = self._solved((x, a[0]), (x, a[0]), log_a, log_a).value
        with torch.no_grad():
            other = self._solved((y, b[0]), (y, b[0]), log_b, log_b).value
        return value - 0.5 * own - 0.5 * other

    def _solved(self, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], log_a: Tensor, log_b: Tensor) -> Transported:
        cost = _distances(*a, *b, cost=self.options.token_cost).to(log_a.dtype)
        return self.options.solve(cost, log_a, log_b)

    def _check(self, student: LogProbs, teacher: LogProbs) -> None:
        y = self.points.student if self.points.teacher is None else self.points.teacher
        for who, found, points in (("student", student, self.points.student), ("teacher", teacher, y)):
            if found.ids is None and found.logp.shape[1] > len(points):
                raise ValueError(
                    f"the {who}'s vocabulary has {found.logp.shape[1]} tokens, the token vectors are of {len(points)}: "
                    "give those of its own vocabulary"
                )


def _top(found: LogProbs, k: int) -> Tensor:
    """ids [n, k] of the k likeliest tokens, all where there are fewer."""
    order = found.logp.detach().topk(min(k, found.logp.shape[1]), dim=-1).indices
    return order if found.ids is None else found.ids.gather(-1, order)


def _all(ids: Tensor) -> tuple[Tensor, Tensor]:
    return ids, torch.ones_like(ids, dtype=torch.bool)


def _union(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both rows' ids [n, u] one after the other, and where an id stands for the first time."""
    again = (second[:, :, None] == first[:, None, :]).any(-1)
    return torch.cat([first, second], 1), torch.cat([_all(first)[1], ~again], 1)


def _restricted(found: LogProbs, ids: Tensor, counted: Tensor) -> Tensor:
    """log of the mass on ``ids`` [n, u], renormalised; -inf where an id is not counted or nothing is known of it."""
    if found.ids is None:
        logp = found.logp.gather(-1, ids)
    else:
        same = ids[:, :, None] == found.ids[:, None, :]
        logp = torch.where(same, found.logp[:, None, :], -torch.inf).amax(-1)
    return torch.where(counted, logp, -torch.inf).log_softmax(-1)


@torch.no_grad()
def _distances(x: Tensor, a: Tensor, y: Tensor, b: Tensor, *, cost: TokenCost) -> Tensor:
    """C [n, u, w] between tokens a [n, u] and b [n, w] by their rows of x [V, F] and y [V', F]; a few rows at a time."""
    rows = max(1, GATHERED // ((a.shape[1] + b.shape[1]) * x.shape[1]))
    with torch.autocast(x.device.type, enabled=False):  # which would round distances to 16 bits
        return torch.cat([_between(x[i], y[j], cost) for i, j in zip(a.split(rows), b.split(rows), strict=True)])


def _between(u: Tensor, v: Tensor, cost: TokenCost) -> Tensor:
    order = 1.0 if cost == "l1" else 2.0
    u, v = (torch.nn.functional.normalize(z.float() if z.dtype.itemsize < 4 else z, p=order, dim=-1) for z in (u, v))
    if cost == "l1":
        return torch.cdist(u, v, p=1.0)
    apart = 1.0 - u @ v.mT
    return apart if cost == "cosine" else 2.0 * apart

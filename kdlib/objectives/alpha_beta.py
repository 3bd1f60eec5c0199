"""The alpha-beta family of divergences (ABKD)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.kernels.outcomes import expectation, kl
from kdlib.objectives.base import Divergence


@dataclass(frozen=True, kw_only=True)
class AlphaBeta(Divergence):
    """-1/(ab) sum_v [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)]; (1, 0) is forward, (0, 1) reverse KL.

    Continuous limits: b = 0: 1/a^2 sum(p^a log(p^a / q^a) - p^a + q^a); a = 0: p and q exchanged;
    a + b = 0: 1/a^2 sum(log(q^a / p^a) + (p / q)^a - 1); a = b = 0: 1/2 sum (log q - log p)^2.
    Powers are taken in log space, so gaps of 200 nats stay finite (ABKD, arXiv 2505.04560; its code takes
    powers of probabilities, with NaN gradients there, and has 1/a where the limit at b = 0 gives 1/a^2).

    Where an exponent is negative, or both are zero, an outcome without mass on one side makes the value +inf,
    and so does overflow; such outcomes give no gradient. Raises ValueError unless alpha > 0, beta > 0, or
    both are 0.
    """

    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.alpha, self.beta) <= 0.0 and (self.alpha, self.beta) != (0.0, 0.0):
            given = f"{self.alpha} and {self.beta}"
            raise ValueError(f"AlphaBeta needs alpha or beta above 0, or both 0, not {given}")

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        a, b = self.alpha, self.beta
        if (a, b) in ((1.0, 0.0), (0.0, 1.0)):
            return kl(logp, logq) if a else kl(logq, logp)
        if a + b == 0.0:
            return _of_ratio(logp - logq, a)
        if b == 0.0:
            return _one_sided(logp, logq, a)
        if a == 0.0:
            return _one_sided(logq, logp, b)
        return self._general(logp, logq)

    def _general(self, logp: Tensor, logq: Tensor) -> Tensor:
        a, b, total = self.alpha, self.beta, self.alpha + self.beta
        some = (logp > -torch.inf) | (logq > -torch.inf)  # an outcome without mass on both sides does not exist
        exponents = (a * logp + b * logq, total * logp, total * logq)
        both, of_p, of_q = (torch.where(some, x, -torch.inf) for x in exponents)
        endless = torch.zeros_like(some)
        if min(a, b, total) < 0.0:  # elsewhere no exponent is above 0
            limit = math.log(torch.finfo(logp.dtype).max) - 1.0
            endless = (both > limit) | (of_p > limit) | (of_q > limit)
            both, of_p, of_q = (torch.where(endless, -torch.inf, x) for x in (both, of_p, of_q))
        terms = (a / total * of_p.exp() + b / total * of_q.exp() - both.exp()) / (a * b)
        return _with_endless(terms, endless)


def _of_ratio(gap: Tensor, a: float) -> Tensor:
    """sum_v of 1/a^2 (e^(a gap) - a gap - 1), or of gap^2 / 2 at a = 0; the gap of 0 and 0 is NaN."""
    endless = gap.isinf() | (a * gap > math.log(torch.finfo(gap.dtype).max) - 1.0)
    gap = torch.where(endless | gap.isnan(), 0.0, gap)
    return _with_endless(0.5 * gap**2 if a == 0.0 else (torch.expm1(a * gap) - a * gap) / a**2, endless)


def _one_sided(logx: Tensor, logy: Tensor, a: float) -> Tensor:
    """1/a^2 sum_v (x^a log(x^a / y^a) - x^a + y^a) for a > 0."""
    powers = (a * logy).exp().sum(-1) - (a * logx).exp().sum(-1)
    return (expectation(a * logx, a * (logx - logy)) + powers) / a**2


def _with_endless(terms: Tensor, endless: Tensor) -> Tensor:
    """The sum of the finite terms, +inf where some are not."""
    return terms.sum(-1) + torch.where(endless.any(-1), torch.inf, 0.0)

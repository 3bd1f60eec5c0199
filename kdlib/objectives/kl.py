"""Kullback-Leibler divergences between teacher p and student q, and their mixtures with skewed partners."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.kernels.outcomes import STEEP, expectation, kl, outcomes
from kdlib.objectives.base import Divergence
from kdlib.types import Support, View


@dataclass(frozen=True, kw_only=True)
class ForwardKL(Divergence):
    """KL(p || q) = sum_v p (log p - log q), with the entropy term: zero, with zero gradient, at p = q.

    Ids drawn from the teacher give the unbiased estimate mean_k (log p - log q) (Hinton 2015; sampled: arXiv 2503.16870).
    """

    accepts = Support.FULL | Support.TOPK | Support.SAMPLED_TEACHER

    def sampled(self, logp: Tensor, logq: Tensor) -> Tensor:
        return logp - logq

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        return kl(logp, logq)


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    """KL(q || p) = sum_v q (log q - log p).

    Ids drawn from the student give mean_k (log q - log p), with the score-function gradient (log q - log p) grad log q, which
    is unbiased for the gradient of the full sum (MiniLLM, arXiv 2306.08543).
    """

    accepts = Support.FULL | Support.TOPK | Support.SAMPLED_STUDENT

    def sampled(self, logp: Tensor, logq: Tensor) -> Tensor:
        gap = (logq - logp).detach()
        return gap + gap.clamp(max=STEEP) * (logq - logq.detach())

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        return kl(logq, logp)


@dataclass(frozen=True, kw_only=True)
class GeneralizedJSD(Divergence):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q; beta 0 is ForwardKL, beta 1 ReverseKL.

    The convention of TRL 1.x and Liger (GKD, arXiv 2306.13649). The ends are special cases: towards them the formula itself
    goes to 0, so its gradient shrinks with beta (1 - beta). KDFlow's jsd_beta is 1 - beta. Differentiable once.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"GeneralizedJSD.beta must be between 0 and 1, not {self.beta}")

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        if self.beta == 0.0:
            return kl(logp, logq)
        if self.beta == 1.0:
            return kl(logq, logp)
        p, q = logp.exp(), logq.exp()
        # only dq (log q - log m) is left of the first derivative, as sum dq = sum dm = 0: no graph for the logarithms
        logm = _log_mixed(p.detach(), q.detach(), weight=self.beta)
        of_p = expectation(logp, logp.detach() - logm, w=p)
        of_q = expectation(logq, logq.detach() - logm, w=q)
        return self.beta * of_p + (1.0 - self.beta) * of_q


@dataclass(frozen=True, kw_only=True)
class SkewKL(Divergence):
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898), true KL with the entropy term.

    Ids drawn from the teacher give the unbiased mean_k (log p - log(alpha p + (1 - alpha) q)).
    """

    accepts = Support.FULL | Support.TOPK | Support.SAMPLED_TEACHER
    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self, self.alpha)

    def sampled(self, logp: Tensor, logq: Tensor) -> Tensor:
        return logp - log_mixture(logp, logq, weight=self.alpha)

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        return _kl_to_mixture(logp, logq, weight=self.alpha)


@dataclass(frozen=True, kw_only=True)
class SkewReverseKL(Divergence):
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM, arXiv 2402.03898).

    The gradient flows through the mixture, as the formula says; DistiLLM-2's code stops it there.
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_alpha(self, self.alpha)

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        return _kl_to_mixture(logq, logp, weight=self.alpha)


@dataclass(frozen=True, kw_only=True)
class AdaptiveKL(Divergence):
    """(g_head KL(p || q) + g_tail KL(q || p)) / (g_head + g_tail), g = sum |p - q| over the teacher's head and tail.

    The head holds the likeliest outcomes up to and including the one whose cumulative mass reaches ``mu``. The weights carry no
    gradient and are 1/2 each at p = q (arXiv 2404.02657; boundary as in DSKD). A top-k's outside mass is always tail.
    """

    mu: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.mu < 1.0:
            raise ValueError(f"AdaptiveKL.mu must be between 0 and 1, not {self.mu}")

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        assert p is not None
        teacher = p.at(self.temperature)
        logq, logp = outcomes(q.at(self.temperature), teacher)
        return self.factor * self._mixed(logp, logq, tokens=teacher.logp.shape[-1])

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        return self._mixed(logp, logq, tokens=logp.shape[-1])

    def _mixed(self, logp: Tensor, logq: Tensor, *, tokens: int) -> Tensor:
        share = self._head_share(logp.detach(), logq.detach(), tokens)
        return share * kl(logp, logq) + (1.0 - share) * kl(logq, logp)

    def _head_share(self, logp: Tensor, logq: Tensor, tokens: int) -> Tensor:
        """g_head / (g_head + g_tail) [n]; only the first ``tokens`` outcomes can be in the head."""
        gap = (logp.exp() - logq.exp()).abs()
        mass, order = logp[:, :tokens].exp().sort(dim=-1, descending=True)
        in_head = mass.cumsum(-1) - mass < self.mu
        head, total = (gap.gather(-1, order) * in_head).sum(-1), gap.sum(-1)
        return torch.where(total > 0, head / total.clamp(min=torch.finfo(gap.dtype).tiny), 0.5)


@dataclass(frozen=True, kw_only=True)
class BalancedKL(Divergence):
    """w_F KL(p || q) + w_R KL(q || p): the side whose entropy falls short is pulled harder (BD-KD, arXiv 2212.12965).

    w_F = ``strong`` where H(p) > H(q), else 1; w_R = ``strong`` where H(q) > H(p), else 1; the weights carry no gradient.
    """

    strong: float = 2.0

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        gap = (expectation(logq, logq) - expectation(logp, logp)).detach()  # H(p) - H(q)
        forward = torch.where(gap > 0, self.strong, 1.0)
        reverse = torch.where(gap < 0, self.strong, 1.0)
        return forward * kl(logp, logq) + reverse * kl(logq, logp)


def log_mixture(loga: Tensor, logb: Tensor, *, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b) elementwise; -inf, with zero gradient, where both are -inf."""
    if weight == 0.0:
        return logb
    if weight == 1.0:
        return loga
    either = (loga > -torch.inf) | (logb > -torch.inf)
    a = torch.where(either, loga, 0.0) + math.log(weight)
    b = torch.where(either, logb, 0.0) + math.log1p(-weight)
    return torch.where(either, torch.logaddexp(a, b), -torch.inf)


def _log_mixed(a: Tensor, b: Tensor, *, weight: float) -> Tensor:
    """log(weight a + (1 - weight) b), 0 < weight < 1, for expectations under a or b: half the cost of ``log_mixture``.

    At least the log of the smallest normal number, where a and b have underflowed and weigh nothing.
    """
    return (torch.lerp(b, a, weight) + torch.finfo(a.dtype).tiny).log()


def _kl_to_mixture(loga: Tensor, logb: Tensor, *, weight: float) -> Tensor:
    """KL(a || weight a + (1 - weight) b)."""
    if weight == 0.0:
        return kl(loga, logb)
    a = loga.exp()
    return kl(loga, _log_mixed(a, logb.exp(), weight=weight), p=a)


def _check_alpha(objective: Divergence, alpha: float) -> None:
    if not 0.0 <= alpha < 1.0:
        raise ValueError(f"{type(objective).__name__}.alpha must be at least 0 and below 1, not {alpha}")

"""Two distributions over one set of outcomes, and sums over it that never make NaN of -inf."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlib.types import LogProbs, Support

STEEP = 1e4  # nats: what stands for an infinite log-ratio in gradients, far above any that trained models have


def outcomes(q: LogProbs, p: LogProbs) -> tuple[Tensor, Tensor]:
    """(log q, log p) over the same outcomes: V of them, or K + 1 when p is a top-k (the last holds the mass outside).

    ``q`` is over the whole vocabulary. On K + 1 outcomes a divergence is a lower bound of the dense one that rises with K.
    """
    if p.ids is None:
        return q.logp, p.logp
    inside = q.logp.gather(-1, p.ids)
    outside = log_total(q.logp.scatter(-1, p.ids, -torch.inf))
    return torch.cat([inside, outside[:, None]], -1), torch.cat([p.logp, p.rest[:, None]], -1)


def log_total(logx: Tensor) -> Tensor:
    """log sum_k exp(log x_k) [n]; -inf, with zero gradient, where all are -inf."""
    some = (logx > -torch.inf).any(-1, keepdim=True)
    return torch.where(some[:, 0], torch.where(some, logx, 0.0).logsumexp(-1), -torch.inf)


def top_k(p: LogProbs, k: int) -> LogProbs:
    """The k likeliest entries of dense or top-k log-probabilities, all other mass in ``rest``.

    Raises ValueError when fewer than k are there.
    """
    if k > p.logp.shape[-1]:
        raise ValueError(f"the top {k} are asked for, the teacher's signal holds {p.logp.shape[-1]}: capture more, or lower k")
    logp, order = p.logp.topk(k, dim=-1)
    ids = order if p.ids is None else p.ids.gather(-1, order)
    others = log_total(p.logp.scatter(-1, order, -torch.inf))
    return LogProbs(logp=logp, ids=ids, rest=torch.logaddexp(others, p.rest), support=Support.TOPK)


def expectation(logw: Tensor, value: Tensor, *, w: Tensor | None = None) -> Tensor:
    """sum_k exp(logw_k) value_k [n], where outcomes without mass count nothing, in value and gradient, whatever ``value`` is.

    +inf where an outcome with mass has value +inf, however small the mass; it then pulls on its weight as if the value were
    ``STEEP``, so that gradients stay finite. ``w``: exp(logw) where the caller has it.
    """
    w = logw.exp() if w is None else w
    if not logw.is_cuda:  # in finite sums the guards below would change nothing; on CUDA looking would wait for the device
        total = (w * value).sum(-1)
        if total.isfinite().all():
            return total
    value = torch.where(logw > -torch.inf, value, 0.0)
    endless = value == torch.inf
    pull = torch.where(endless, STEEP, value) if logw.requires_grad else value
    least = torch.finfo(w.dtype).tiny  # exp underflows below about -87
    return (w.clamp(min=least) * pull).sum(-1) + torch.where(endless.any(-1), torch.inf, 0.0)


def kl(logp: Tensor, logq: Tensor, *, p: Tensor | None = None) -> Tensor:
    """KL(p || q) = sum_k p_k (log p_k - log q_k) [n]; +inf where p has mass and q none. ``p``: exp(logp) if at hand."""
    return expectation(logp, logp - logq, w=p)


def entropy(logp: Tensor) -> Tensor:
    """-sum_k p_k log p_k [n] in nats."""
    return -expectation(logp, logp)

"""Losses made of the acceptance rate of one drafted token, alpha = sum_v min(p_v, q_v) = 1 - TV(p, q).

On a top-k signal alpha runs over K + 1 outcomes, the last being all mass outside: an upper bound of the true rate that falls to
it as K grows, so that both losses are lower bounds of the dense ones (LK losses, arXiv 2602.23881).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.kernels.outcomes import kl, log_total
from kdlib.objectives.base import Divergence


@dataclass(frozen=True, kw_only=True)
class NegLogAcceptance(Divergence):
    """-log sum_v min(p_v, q_v), by logsumexp of min(log p, log q); cross-entropy where p is one-hot.

    Its gradient is that of TV over alpha: sum_v w_v 1[q_v < p_v] (q - e_v) with w = min(p, q) / alpha, as large at alpha =
    1e-80 as at 1/2. Where p and q have no outcome in common it is +inf with forward KL's gradient q - p. (speculators clamps
    alpha at 1e-5 and SpecForge skips alpha = 0, so that their worst positions teach nothing.)
    """

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        log_alpha = log_total(torch.where(logq < logp, logq, logp))
        apart = log_alpha == -torch.inf
        if not logq.is_cuda and not apart.any():  # on CUDA looking would wait for the device
            return -log_alpha
        return torch.where(apart, kl(logp, logq), -log_alpha)


@dataclass(frozen=True, kw_only=True)
class LKHybrid(Divergence):
    """lam KL(p || q) + (1 - lam) TV(p, q) with lam = exp(-eta stopgrad(alpha)) of the row itself.

    KL, whose gradient is strong, where little is accepted; TV, which is what counts, where much is. ``eta`` 0 is ForwardKL.
    SpecForge takes one lam from the batch's mean alpha instead.
    """

    eta: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eta < 0.0:
            raise ValueError(f"LKHybrid.eta must be 0 or more, not {self.eta}")

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        p, q = logp.exp(), logq.exp()
        variation = 0.5 * (p - q).abs().sum(-1)
        # never 0, also where exp underflows: 0 times an infinite KL would be NaN
        share = (-self.eta * (1.0 - variation.detach())).exp().clamp(min=torch.finfo(p.dtype).tiny)
        return share * kl(logp, logq, p=p) + (1.0 - share) * variation

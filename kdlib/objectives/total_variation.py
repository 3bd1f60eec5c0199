"""Total variation distance: one minus the acceptance rate of speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdlib.objectives.base import Divergence


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Divergence):
    """1/2 sum_v |p - q|. Its gradient scales with 1/T where KL's scales with 1/T^2, so ``t_squared`` overscales it."""

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        return 0.5 * (logp.exp() - logq.exp()).abs().sum(-1)

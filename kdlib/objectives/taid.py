"""Temporally adaptive interpolated distillation: the target moves from the student to the teacher during training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.kernels.outcomes import kl
from kdlib.objectives.base import Divergence, State


@dataclass(frozen=True, kw_only=True)
class Interpolated(Divergence):
    """KL(p_t || q) with p_t = softmax((1 - t) stopgrad(student logits) + t teacher logits), at a fixed t.

    On a top-k signal the interpolation is the normalised geometric mean over the K + 1 outcomes.
    """

    t: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.t <= 1.0:
            raise ValueError(f"t must be between 0 and 1, not {self.t}")

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        if self.t == 1.0:
            return kl(logp, logq)
        own = logq.detach()
        # an outcome impossible for one side is impossible for the mixture; 0 * -inf is never formed
        both = (logp > -torch.inf) & (own > -torch.inf) if self.t > 0.0 else own > -torch.inf
        mixed = (1.0 - self.t) * torch.where(both, own, 0.0) + self.t * torch.where(both & (logp > -torch.inf), logp, 0.0)
        return kl(torch.where(both, mixed, -torch.inf).log_softmax(-1), logq)


@dataclass(frozen=True, kw_only=True)
class TAID(Divergence):
    """``Interpolated`` whose t grows from ``t_start`` to ``t_end``, faster while the loss falls (arXiv 2501.16937).

    After each optimizer step but the first: r = max(-1, (previous - loss) / previous); m = momentum m + (1 - momentum) r;
    t = min(t_end, max(linear schedule, t + alpha sigmoid(m) (1 - t))). The loss is the global one of the step, once per step
    and never in eval; the reference code updates per micro-batch and rank, and on cross-entropy instead of KL.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    momentum: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.t_start <= self.t_end <= 1.0:
            raise ValueError(f"TAID needs 0 <= t_start <= t_end <= 1, not {self.t_start} and {self.t_end}")
        if self.alpha < 0.0 or not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"TAID needs alpha >= 0 and 0 <= momentum < 1, not {self.alpha} and {self.momentum}")

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        """The loss at the start of a run; during one the trainer binds the state first."""
        return self.bind(self.init_state()).between(logp, logq)

    def init_state(self, max_steps: int = 1) -> State:
        return {"t": self.t_start, "momentum": 0.0, "max_steps": float(max_steps)}

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> State:
        linear = self.t_start + (self.t_end - self.t_start) * step / state["max_steps"]
        if "previous" not in state:
            return {**state, "t": min(self.t_end, max(linear, state["t"])), "previous": global_loss}
        # true KL is 0 at t = 0 and may be infinite: without the bound one such step would sink the momentum for good
        relative = (state["previous"] - global_loss) / (state["previous"] + 1e-15)
        relative = max(-1.0, relative) if math.isfinite(relative) else 0.0
        momentum = self.momentum * state["momentum"] + (1.0 - self.momentum) * relative
        raised = state["t"] + self.alpha / (1.0 + math.exp(-momentum)) * (1.0 - state["t"])
        return {**state, "t": min(self.t_end, max(linear, raised)), "momentum": momentum, "previous": global_loss}

    def bind(self, state: Mapping[str, float]) -> Interpolated:
        return Interpolated(t=state["t"], temperature=self.temperature, t_squared=self.t_squared)

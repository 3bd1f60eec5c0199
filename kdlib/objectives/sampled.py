"""Reverse KL from the one token that the student drew, for teachers that give no more than its log-probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdlib.kernels.outcomes import STEEP
from kdlib.objectives.base import RowObjective
from kdlib.types import DenseView, Support, View


@dataclass(frozen=True, kw_only=True)
class SampledReverseKL(RowObjective):
    """KL(q || p) estimated at the label y that the student drew, in policy-gradient form.

    The gradient of a row is w (log q(y) - log p(y)) grad log q(y), whose mean over y ~ q is the gradient of KL(q || p), as the
    score itself has mean zero. w = min(q(y) / d(y), ``importance_clip``), where d(y) is the probability with which y was drawn
    (``Positions.drawn``): labels of an older student or of another sampling temperature then count as they should. Clipping
    trades variance for bias; None does not clip. The value of a row is w k1 or w k3 (``estimator``): k1 = log q(y) - log p(y),
    and k3 = r - 1 - log r with r = p(y) / q(y), which is never negative; unclipped, both have the mean KL(q || p).

    A label that was not drawn (``drawn`` NaN, or None) says nothing about q: its row is 0, and counts as a row. Text of a
    dataset thus teaches nothing here: set on_policy_fraction to 1, or put CrossEntropy beside it in a Sum.
    Raises ValueError for another temperature than 1 and for an ``importance_clip`` below 1.
    """

    accepts = Support.SAMPLED_STUDENT | Support.FULL
    estimator: Literal["k1", "k3"] = "k1"
    importance_clip: float | None = 2.0

    def __post_init__(self) -> None:
        if self.temperature != 1.0 or self.t_squared:
            raise ValueError("SampledReverseKL is taken at temperature 1: leave temperature and t_squared out")
        if self.estimator not in ("k1", "k3"):
            raise ValueError(f"SampledReverseKL.estimator is k1 or k3, not {self.estimator}")
        if self.importance_clip is not None and not self.importance_clip >= 1.0:
            raise ValueError(
                f"SampledReverseKL.importance_clip must be at least 1, not {self.importance_clip}: null clips nothing"
            )

    @property
    def reads_drawn(self) -> bool:
        return True

    @property
    def reads_labels(self) -> bool:
        return True

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        assert p is not None and isinstance(q, DenseView)
        logq = q.at(1.0).logp.gather(-1, labels[:, None])[:, 0]
        if q.drawn is None:
            return 0.0 * logq
        drawn = q.drawn.isfinite() & (logq > -torch.inf)
        logq = torch.where(drawn, logq, 0.0)
        clip = torch.inf if self.importance_clip is None else self.importance_clip
        ratio = (logq.detach() - torch.where(drawn, q.drawn, 0.0)).exp().clamp(max=clip)
        gap = logq.detach() - torch.where(drawn, _at_labels(p, labels), 0.0)
        value = gap if self.estimator == "k1" else torch.expm1(-gap) + gap
        pull = gap.clamp(max=STEEP)  # the teacher may rule the label out, and inf * 0 is NaN
        return torch.where(drawn, ratio * value + ratio * pull * (logq - logq.detach()), 0.0)


def _at_labels(p: View, labels: Tensor) -> Tensor:
    """log p(y) [n]; of a sampled signal the one id of each row is the label."""
    found = p.at(1.0)
    return found.logp.gather(-1, labels[:, None])[:, 0] if found.ids is None else found.logp[:, 0]

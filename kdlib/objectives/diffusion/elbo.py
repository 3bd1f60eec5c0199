"""The masked-diffusion evidence lower bound: pretraining, adaptation and fine-tuning of diffusion language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from kdlib.diffusion.noise import Noise
from kdlib.kernels import linear_objective
from kdlib.objectives.cross_entropy import CrossEntropy
from kdlib.objectives.diffusion.base import Corruption, DiffusionObjective, Scored, View
from kdlib.types import Loss, StudentSignal, TeacherSignal

CART = 0.3  # Dream's geometric distribution over distances
Weighting = Literal["elbo", "uniform", "cart"]
Normalize = Literal["token", "sequence"]


@dataclass(frozen=True, kw_only=True)
class MaskedELBO(DiffusionObjective):
    """sum over masked tokens of w CE / n, CE = -log q(token | what is not masked) in nats.

    weighting elbo: w = 1 / p, the linear schedule, n the tokens that may be masked. With ``uniform`` or ``per_block`` masking
    its mean over draws is, up to eps, an upper bound of -log q(response | prompt) / n (LLaDA, arXiv 2502.09992, MDLM).
    uniform: w = 1, n the masked tokens: plain cross-entropy, no bound. cart: w_i = sum over tokens j that are not masked of
    0.5 c (1 - c)^(|i - j| - 1), c = 0.3: near context counts more (Dream, arXiv 2508.15487, which also counts padding).
    normalize token: n is that of all rows; sequence: each row is divided by its own n, the sum by the rows that have one.
    """

    masking = "uniform"
    accepts = None
    weighting: Weighting = "elbo"
    normalize: Normalize = "token"

    def __post_init__(self) -> None:
        for name, choices in (("weighting", get_args(Weighting)), ("normalize", get_args(Normalize))):
            if getattr(self, name) not in choices:
                raise ValueError(f"MaskedELBO.{name} {getattr(self, name)!r}: choose {', '.join(choices)}")

    def corrupt(self, noise: Noise) -> Corruption:
        masked = noise.masked()
        n = (masked if self.weighting == "uniform" else noise.segment).sum(1)
        weight, total = self._weight(noise, masked), n.sum()
        if self.normalize == "sequence":
            weight, total = weight / n.clamp(min=1)[:, None], (n > 0).sum()
        scored = Scored(view=0, where=masked, weight=weight, total=int(total))
        return Corruption(student=(View(masked=masked | noise.tail),), scored={"cross_entropy": scored})

    def _weight(self, noise: Noise, masked: Tensor) -> Tensor:
        if self.weighting == "uniform":
            return masked.to(noise.p.dtype)
        if self.weighting == "elbo":
            return torch.where(masked, 1.0 / noise.p, 0.0)
        known = ~(masked | noise.tail)
        return _nearness(known if noise.rows.visible is None else known & noise.rows.visible, dtype=noise.p.dtype)

    def terms(
        self, student: Mapping[str, StudentSignal], teacher: Mapping[str, TeacherSignal | None], *, metrics: bool = False
    ) -> dict[str, Loss]:
        return {"cross_entropy": linear_objective(student["cross_entropy"], None, CrossEntropy(), metrics=metrics)}


def _nearness(known: Tensor, *, dtype: torch.dtype) -> Tensor:
    """[B, S] sum_j known_j 0.5 c (1 - c)^(|i - j| - 1) over j != i."""
    column = torch.arange(known.shape[1], device=known.device)
    distance = (column - column[:, None]).abs().to(dtype)
    near = (0.5 * CART * (1.0 - CART) ** (distance - 1.0)).fill_diagonal_(0.0)
    return known.to(dtype) @ near

"""AdaSPEC (arXiv 2510.19779): a draft trains on the tokens where it has most to gain, as a reference model shows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdlib.objectives.kl import ForwardKL


@dataclass(frozen=True, kw_only=True)
class SelectiveKL(ForwardKL):
    """KL(p || q) of the ``fraction`` of rows with the largest delta = KL(p || q) - KL(p || reference); 1 keeps all.

    The reference is a model of the draft's size, distilled with ForwardKL from where the draft starts. Which rows are kept is
    decided before the forward pass, by a trainer that has the reference (``select`` at ``threshold``); elsewhere, also in
    ``on_logits``, all are and this is ForwardKL. The paper's code takes the quantile on each device's micro-batch and divides
    by all label tokens; here it is taken over the global batch of the optimizer step, and the sum divided by the kept rows.
    ``normalize="all"`` divides by all scored rows: the paper's scale, smaller by the kept share.
    """

    fraction: float = 0.4
    normalize: Literal["kept", "all"] = "kept"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError(f"SelectiveKL.fraction must be above 0 and at most 1, not {self.fraction}")
        if self.normalize not in ("kept", "all"):
            raise ValueError(f"SelectiveKL.normalize must be kept or all, not {self.normalize!r}")


def potential(draft_loss: Tensor, reference_loss: Tensor) -> Tensor:
    """delta [N] = L_draft - L_reference, nats; 0 where both are infinite."""
    delta = draft_loss - reference_loss
    return torch.where(delta.isnan(), 0.0, delta)


def threshold(delta: Tensor, fraction: float) -> Tensor:
    """The smallest delta that is kept (scalar), of all rows' delta [N], N > 0: the (1 + floor(fraction (N - 1)))-th largest.

    These are the rows at or above torch.quantile(delta, 1 - fraction), without interpolation and its limit on N.
    """
    assert len(delta), "no row to choose from"
    return delta.topk(1 + math.floor(fraction * (len(delta) - 1))).values[-1]


def select(draft_loss: Tensor, reference_loss: Tensor, threshold: Tensor) -> Tensor:
    """Which rows are kept [N] (bool): all with delta at or above the threshold, ties included."""
    return potential(draft_loss, reference_loss) >= threshold


def check_reference(objective: object, reference: object) -> None:
    """ValueError for SelectiveKL without a reference, and for a reference that no SelectiveKL reads."""
    if isinstance(objective, SelectiveKL) and reference is None:
        raise ValueError(
            "SelectiveKL chooses rows by a reference model: give one (--reference DIR; --reference train makes it)"
        )
    if reference is not None and not isinstance(objective, SelectiveKL):
        raise ValueError("a reference model is read by SelectiveKL alone: leave it out, or add --objective SelectiveKL")

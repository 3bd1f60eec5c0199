"""Cross-entropy with the labels: plain fine-tuning, and the hard half of mixed losses."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdlib.objectives.base import RowObjective
from kdlib.types import View


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(RowObjective):
    """-log q(label) in nats, always at temperature 1; needs no teacher.

    Raises ValueError for another temperature: the labels are not tempered, so there is nothing for it to divide.
    """

    accepts = None

    def __post_init__(self) -> None:
        if self.temperature != 1.0:
            raise ValueError("CrossEntropy is taken at temperature 1: leave its temperature out")

    @property
    def reads_labels(self) -> bool:
        return True

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        return -q.at(1.0).logp.gather(-1, labels[:, None])[:, 0]

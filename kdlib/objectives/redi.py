"""Right and wrong answers of a teacher, without a reference model: likelier the one, less likely the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdlib.head import accumulation_dtype
from kdlib.kernels import linear_objective
from kdlib.objectives.base import Objective
from kdlib.objectives.cross_entropy import CrossEntropy
from kdlib.types import Loss, Positions, StudentSignal, TeacherSignal

POSITIVE, NEGATIVE = "positive", "negative"


@dataclass(frozen=True, kw_only=True)
class REDI(Objective):
    """mean over pairs of -positive_weight log q(y+) / |y+| + alpha log q(y-) / |y-|, of a right and a wrong answer to a prompt.

    |y| counts the tokens of an answer that are scored, after truncation; the published code takes the lengths from before it.
    ``alpha`` below 1 keeps the pull towards right answers the stronger one; at 1 nothing does, and training collapses sooner.
    No teacher and no reference model take part. In ``Positions`` the tokens of pair i's right answer are sequence 2i, those of
    its wrong one sequence 2i + 1, which may be missing. Source: reinforcement distillation (REDI), its paper and its code.
    Raises ValueError for weights below 0, and for two of 0.
    """

    accepts = None

    positive_weight: float = 1.0
    alpha: float = 0.8

    def __post_init__(self) -> None:
        if min(self.positive_weight, self.alpha) < 0 or self.positive_weight == self.alpha == 0:
            raise ValueError(
                f"REDI needs positive_weight and alpha of 0 or more, not both 0: not {self.positive_weight} and {self.alpha}"
            )

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None) -> Loss:
        """The sum over pairs, and their number."""
        losses = {}
        for name, positions in by_sign(student.positions).items():
            rows = student.hidden[is_of(student.positions, name)]
            losses[name] = self.term(replace(student, hidden=rows, positions=positions))
        total = torch.stack([self.weight(name) * loss.sum for name, loss in losses.items()]).sum()
        return Loss(sum=total, count=losses[POSITIVE].count)

    def weight(self, name: str) -> float:
        """What a term's mean counts in the loss: the negative one is to grow."""
        return self.positive_weight if name == POSITIVE else -self.alpha

    def term(self, student: StudentSignal, *, metrics: bool = False) -> Loss:
        """The sum of -log q(y) / |y| over the answers of one sign (``by_sign``), and the number of pairs."""
        positions = student.positions
        assert positions.weight is not None
        weight = positions.weight.to(accumulation_dtype(student.hidden, student.head.weight))
        weighted = replace(student, positions=replace(positions, weight=weight))
        loss = linear_objective(weighted, None, CrossEntropy(), metrics=metrics)
        return replace(loss, count=positions.denominator)


def by_sign(positions: Positions) -> dict[str, Positions]:
    """The positions of right and of wrong answers, with 1 / |y| as ``weight`` and the number of pairs as ``total``."""
    lengths = torch.bincount(positions.sequence)[positions.sequence]
    weighted = replace(positions, weight=1.0 / lengths.double())
    pairs = len(torch.unique(positions.sequence[is_of(positions, POSITIVE)]))
    return {name: replace(weighted.kept(is_of(positions, name)), total=pairs) for name in (POSITIVE, NEGATIVE)}


def is_of(positions: Positions, name: str) -> Tensor:
    """[N]: whether a position is of a right (POSITIVE) or a wrong (NEGATIVE) answer."""
    return (positions.sequence % 2 == 0) == (name == POSITIVE)

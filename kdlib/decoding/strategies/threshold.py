"""As many tokens in a pass as are sure enough, and always the surest one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kdlib.decoding.diffusion_step import Step, Strategy, with_best
from kdlib.decoding.strategies.scores import confidence, entropy, ranks


@dataclass(frozen=True, kw_only=True)
class ConfidenceThreshold(Strategy):
    """All proposals of confidence >= ``threshold`` (Fast-dLLM, arXiv 2505.22618). ValueError outside of 0 .. 1."""

    threshold: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold}: choose a probability, 0 to 1")

    def commits(self, step: Step) -> Tensor:
        score = confidence(step)
        return with_best(score >= self.threshold, score=score, masked=step.masked)


@dataclass(frozen=True, kw_only=True)
class EntropyThreshold(Strategy):
    """All columns of entropy <= ``threshold`` nats (dParallel, arXiv 2509.26488). ValueError below 0."""

    threshold: float = 0.45

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold {self.threshold}: choose an entropy in nats, at least 0")

    def commits(self, step: Step) -> Tensor:
        score = entropy(step)
        return with_best(score <= self.threshold, score=-score, masked=step.masked)


@dataclass(frozen=True, kw_only=True)
class Factor(Strategy):
    """The r most confident proposals, r the largest one with confidence_i >= 1 - factor / (i + 1) for all i <= r (Fast-dLLM).

    The bound rises with i while confidences fall: whoever meets it has only such before him. ValueError for a ``factor`` that
    is not above 0.
    """

    factor: float = 1.0

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"factor {self.factor}: choose a number above 0; larger ones commit more")

    def commits(self, step: Step) -> Tensor:
        score = confidence(step)
        rank = ranks(score, masked=step.masked) + 1
        return with_best(score >= 1 - self.factor / (rank + 1), score=score, masked=step.masked)

"""A fixed number of passes: each commits its share of the block, the best-scored tokens first."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from kdlib.decoding.diffusion_step import Step, Strategy, with_best
from kdlib.decoding.strategies.scores import confidence, margin, ranks


@dataclass(frozen=True, kw_only=True)
class Quota(Strategy):
    """``steps`` passes for a whole response, spread evenly over its blocks: s_k = steps // blocks, one more in the first
    steps % blocks ones, at least 1. Pass i of a block of m tokens commits m // s_k, one more in the first m % s_k passes, at
    least 1 (LLaDA, arXiv 2502.09992). Raises ValueError for less than one step.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}: choose at least 1, for example one for each token")

    @abstractmethod
    def score(self, step: Step) -> Tensor:
        """[b, n] what the best tokens have most of."""

    def commits(self, step: Step) -> Tensor:
        passes = (self.steps // step.blocks + (step.current < self.steps % step.blocks)).clamp(min=1)
        tokens = (step.block == step.current[:, None]).sum(-1)
        quota = tokens // passes + (step.step <= tokens % passes)
        score = self.score(step)
        return with_best(ranks(score, masked=step.masked) < quota[:, None], score=score, masked=step.masked)


@dataclass(frozen=True, kw_only=True)
class LowConfidence(Quota):
    """The most confident proposals first: what has low confidence stays masked ("low_confidence" remasking of LLaDA)."""

    def score(self, step: Step) -> Tensor:
        return confidence(step)


@dataclass(frozen=True, kw_only=True)
class TopKMargin(Quota):
    """The largest differences between the two largest probabilities first ("topk_margin" of Dream, arXiv 2508.15487)."""

    def score(self, step: Step) -> Tensor:
        return margin(step)

"""A fixed number of passes: each commits its share of the block, the best-scored tokens first."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from kdlib.decoding.diffusion_step import Step, Strategy, with_best
from kdlib.decoding.strategies.scores import confidence, margin, ranks


@dataclass(frozen=True, kw_only=True)
class Quota(Strategy):
    """``steps`` passes for a response of G tokens, spread over its blocks by their tokens, at least one each: a block of
    columns s .. e - 1 has k = ceil(steps e / G) - ceil(steps s / G). Pass i of k commits m // k of its m tokens, one more in
    the first m % k passes, at least one (LLaDA, arXiv 2502.09992): steps = G is one token a pass.

    Raises ValueError for less than one step.
    """

    steps: int

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps {self.steps}: choose at least 1, for example one for each token")

    @abstractmethod
    def score(self, step: Step) -> Tensor:
        """[b, n] what the best tokens have most of."""

    def commits(self, step: Step) -> Tensor:
        length, start = step.canvas.shape[1] - step.start, step.column[:, 0]  # a window begins with the current block
        tokens = (step.block == step.current[:, None]).sum(-1)
        until = [-(-self.steps * column // length) for column in (start, start + tokens)]
        passes = (until[1] - until[0]).clamp(min=1)
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

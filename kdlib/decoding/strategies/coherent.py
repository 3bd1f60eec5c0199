"""Distributions averaged over the contexts in which a column was seen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kdlib.decoding.diffusion_step import Step, Strategy, proposals
from kdlib.decoding.strategies.memory import remember, remembered
from kdlib.decoding.strategies.threshold import ConfidenceThreshold

_HISTORY = "coherent context"


@dataclass(frozen=True, kw_only=True)
class CoherentContext(Strategy):
    """Another ``strategy`` on p_c = (1/m) sum_i p_c^(i), the mean of column c's last m <= ``history`` distributions.

    Coherent contextual decoding (CCD, arXiv 2512.02044) averages what a column's passes say of it, since each saw another
    context. The paper's buffer and its adaptive number of tokens a step are not public; this is our reading: passes since the
    column came into the window, the likeliest token of the mean as proposal, and the strategy's own rule. It keeps
    [b, n, history - 1, V] probabilities. Raises ValueError for less than one pass.
    """

    strategy: Strategy = field(default_factory=ConfidenceThreshold)
    history: int = 4

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"history {self.history}: choose at least 1 pass, which is the strategy alone")

    @property
    def live_blocks(self) -> int:
        return self.strategy.live_blocks

    @property
    def guide_passes(self) -> int:
        return self.strategy.guide_passes

    def commits(self, step: Step) -> Tensor:
        passes = torch.cat([step.logits.softmax(-1)[:, :, None], self._before(step)], dim=2)
        remember(step, _HISTORY, passes[:, :, : self.history - 1])
        total = passes.sum(2)  # passes that did not see the column are zeros
        logits = (total / total.sum(-1, keepdim=True)).log()
        step.tokens.copy_(proposals(logits, temperature=step.temperature, uniform=step.uniform))
        return self.strategy.commits(replace(step, logits=logits))

    def _before(self, step: Step) -> Tensor:
        """[b, n, m, V] the columns' last distributions, the newest first, zeros where there was none; m < history."""
        found = remembered(step, _HISTORY)
        if found is None:
            return step.logits.new_zeros(*step.tokens.shape, 0, step.logits.shape[-1])
        states, known = found
        return states * known[:, :, None, None]

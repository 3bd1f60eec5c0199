"""Two blocks at once: the first one decoded as always, the second one only where it has settled."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from kdlib.decoding.diffusion_step import Step, Strategy
from kdlib.decoding.strategies.memory import remember, remembered
from kdlib.decoding.strategies.threshold import ConfidenceThreshold

_LAST = "slow fast"


@dataclass(frozen=True, kw_only=True)
class SlowFast(Strategy):
    """Another ``strategy`` on the current block and on those columns c of the next one whose distribution stands still:

    (1/2) sum_v |p_c(v) - p'_c(v)| <= ``tolerance``, p' that of the pass before. A column that no pass has seen yet waits for
    one. The slow-fast decoding of SPEED (ICML 2026) defers tokens whose distribution moves with the preceding block; its
    distance and tolerance are not public, this is our reading. Raises ValueError for a tolerance outside of 0 .. 1 and for a
    strategy that has several blocks itself.
    """

    strategy: Strategy = field(default_factory=ConfidenceThreshold)
    tolerance: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance <= 1:
            raise ValueError(f"tolerance {self.tolerance}: choose a total variation distance, 0 to 1")
        if self.strategy.live_blocks > 1:
            raise ValueError(f"SlowFast adds the next block itself: {type(self.strategy).__name__} has several, choose another")

    @property
    def live_blocks(self) -> int:
        return 2

    @property
    def guide_passes(self) -> int:
        return self.strategy.guide_passes

    def commits(self, step: Step) -> Tensor:
        probs = step.logits.softmax(-1)
        ready = step.block == step.current[:, None]
        if found := remembered(step, _LAST):
            before, known = found
            ready = ready | (known & ((probs - before).abs().sum(-1) / 2 <= self.tolerance))
        remember(step, _LAST, probs)
        return self.strategy.commits(replace(step, masked=step.masked & ready))

"""Several blocks at once: the next one joins before the last one is complete."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.decoding.diffusion_step import Step, Strategy, with_best
from kdlib.decoding.strategies.scores import entropy

_LAST = "multi block"


@dataclass(frozen=True, kw_only=True)
class MultiBlock(Strategy):
    """All columns of entropy <= ``threshold`` nats in up to ``blocks`` live blocks (d3LLM, arXiv 2601.07568).

    Before a pass' commits the next block becomes live if at least ``add`` of the last live one is committed. The column of
    lowest entropy always commits. A block is activated if at least ``activate`` of the one before it is committed, as the first
    one always is; the first activated block with masked columns, of which the rule would commit none, commits its column of
    lowest entropy. With add = activate = 1 it is EntropyThreshold. Raises ValueError for values out of range.
    """

    threshold: float = 0.45
    add: float = 0.1
    activate: float = 0.95
    blocks: int = 4

    def __post_init__(self) -> None:
        if not self.threshold >= 0 or self.blocks < 1:
            raise ValueError(f"threshold {self.threshold} and blocks {self.blocks}: choose at least 0 nats and 1 block")
        if not (0 < self.add <= 1 and 0 < self.activate <= 1):
            raise ValueError(f"add {self.add} and activate {self.activate}: choose parts of a block, above 0 and at most 1")

    @property
    def live_blocks(self) -> int:
        return self.blocks

    def commits(self, step: Step) -> Tensor:
        number = step.current[:, None] + torch.arange(self.blocks, device=step.block.device)  # [b, blocks]
        inside = step.block[:, :, None] == number[:, None]  # [b, n, blocks]
        left = (inside & step.masked[:, :, None]).sum(1)
        committed = 1 - left.double() / inside.sum(1).clamp(min=1)
        last = self._last(step, committed)
        live = step.masked & (step.block <= last[:, None])
        score = -entropy(step)
        chosen = with_best(-score <= self.threshold, score=score, masked=live)

        activated = torch.cat([torch.ones_like(left[:, :1], dtype=torch.bool), committed[:, :-1] >= self.activate], dim=1)
        idle = activated & (number <= last[:, None]) & (left > 0) & ~(inside & chosen[:, :, None]).any(1)
        first = idle & (idle.cumsum(1) == 1)
        forced = live & (inside & first[:, None]).any(2)
        return chosen | with_best(torch.zeros_like(chosen), score=score, masked=forced)

    def _last(self, step: Step, committed: Tensor) -> Tensor:
        """[b] the last live block; ``committed`` [b, blocks] the part of each block of the window that is."""
        last = step.memory.get(_LAST, step.current)
        index = last - step.current  # below 0 where all live blocks are complete
        part = torch.where(index < 0, 1.0, committed.gather(1, index.clamp(min=0)[:, None])[:, 0])
        most = torch.minimum(step.current + self.blocks, step.blocks) - 1
        step.memory[_LAST] = torch.minimum(last + (part >= self.add), most)
        return step.memory[_LAST]

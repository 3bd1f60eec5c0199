"""What a decoding strategy of a diffusion language model sees of a step, and what it answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdlib.decoding.sampling import draw


@dataclass(frozen=True, kw_only=True)
class Step:
    """b rows after a forward pass, each with a window of n columns of its response.

    ``logits`` [b, n, V] float32, MASK at -inf: entry j says which token stands in column j of the window. ``tokens`` [b, n]:
    the proposals, likeliest tokens or draws. ``masked`` [b, n]: columns that are still MASK and may be committed.
    ``column`` [b, n]: their number in the response, from 0; ``block`` [b, n]: their block's, -1 where a row's window is shorter
    than others'. ``current`` [b]: the first block
    that is not complete; ``step`` [b]: passes since it became that, this one included. ``blocks`` [b]: blocks of the response,
    ``block_length`` tokens each, the first and last ones perhaps fewer. ``canvas`` [b, L]: prompt and response as they stand
    (MASK where not committed), of which ``visible`` [b, L] is no padding; ``start``: the column of the canvas where the
    responses begin. ``memory``: what the strategy keeps between steps, tensors [b, ...] whose rows the loop drops with the
    batch's; empty at the first step. ``temperature`` and ``uniform`` [b, n]: what proposals are drawn with, in [0, 1); None at
    temperature 0.
    """

    logits: Tensor
    tokens: Tensor
    masked: Tensor
    column: Tensor
    block: Tensor
    current: Tensor
    step: Tensor
    blocks: Tensor
    block_length: int
    canvas: Tensor
    visible: Tensor
    start: int
    memory: dict[str, Tensor] = field(default_factory=dict)
    temperature: float = 0.0
    uniform: Tensor | None = None


class Strategy(ABC):
    """Which proposals are committed. A frozen keyword-only dataclass whose fields are YAML and CLI options.

    ``live_blocks``: how many blocks, from the current one on, a window shows; 1 for one block at a time. ``guide_passes``:
    passes of another model that a step takes.
    """

    @property
    def live_blocks(self) -> int:
        return 1

    @property
    def guide_passes(self) -> int:
        return 0

    @abstractmethod
    def commits(self, step: Step) -> Tensor:
        """[b, n] the columns to commit, some of ``step.masked``: at least one in every row that has any.

        May write ``step.memory`` and, in place, ``step.tokens``.
        """


def with_best(chosen: Tensor, *, score: Tensor, masked: Tensor) -> Tensor:
    """``chosen`` [b, n] and each row's best-scored masked column, so that every step commits one; ties go to the left."""
    best = score.masked_fill(~masked, -torch.inf).argmax(-1, keepdim=True)
    return (chosen | torch.zeros_like(masked).scatter(-1, best, True)) & masked


def proposals(logits: Tensor, *, temperature: float, uniform: Tensor | None) -> Tensor:
    """Token ids [b, n] of ``logits`` [b, n, V]: the likeliest at temperature 0, else drawn from softmax(z / T)."""
    if uniform is None:
        return logits.argmax(-1)
    logp = (logits / temperature).log_softmax(-1)
    return draw(logp.flatten(0, 1), uniform.flatten()).view(uniform.shape)

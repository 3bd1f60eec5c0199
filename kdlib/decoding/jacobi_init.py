"""What stands in a block before the first pass over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

INITS = ("prompt", "random", "last")


@dataclass(frozen=True, kw_only=True)
class Unknown:
    """Tokens of b rows that are still to be guessed.

    ``prompts`` [b, P] left-padded, of which the last ``lengths`` [b] are the row's own; ``position`` [b, k]: the tokens' places
    among the row's new tokens, from 0; ``last`` [b, k] (or [b, 1]): the last known token before them; ``uniform`` [b, k]:
    numbers in [0, 1) that depend on the row's seed and on ``position`` alone.
    """

    prompts: Tensor
    lengths: Tensor
    position: Tensor
    last: Tensor
    uniform: Tensor

    def of_prompt(self, index: Tensor) -> Tensor:
        """The prompts' tokens number ``index`` [b, k], counted from each row's own first one."""
        start = self.prompts.shape[1] - self.lengths[:, None]
        return self.prompts.gather(1, start + index)


Init = Literal["prompt", "random", "last"] | Callable[[Unknown], Tensor]


def first_guess(init: Init, unknown: Unknown) -> Tensor:
    """Token ids [b, k].

    ``prompt``: new token p gets prompt[p % P], as in block b = p // n with j = p % n: prompt[(b n + j) % P]; ``random``: drawn
    with replacement from the prompt's tokens (CLLM); ``last``: the last known token again; or a function of ``Unknown``.
    Raises ValueError for an unknown name and for a function that gives another shape.
    """
    if callable(init):
        found = init(unknown)
        if found.shape != unknown.position.shape:
            raise ValueError(f"init gave tokens of shape {tuple(found.shape)} for {tuple(unknown.position.shape)} places")
        return found
    if init not in INITS:
        raise ValueError(f"init {init!r}: choose {', '.join(INITS)} or a function of Unknown")
    if init == "last":
        return unknown.last.expand_as(unknown.position)
    lengths = unknown.lengths[:, None]
    if init == "prompt":
        return unknown.of_prompt(unknown.position % lengths)
    return unknown.of_prompt(torch.minimum((unknown.uniform * lengths).long(), lengths - 1))

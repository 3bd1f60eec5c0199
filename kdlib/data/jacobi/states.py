"""The states that a row's blocks went through: stored, iterated by a model, or made of noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NOISE_CONTEXT = 128  # how far back noise tokens come from, as in Jacobi Forcing's synthetic trajectories


@dataclass(frozen=True, kw_only=True)
class Block:
    """Tokens ``start`` .. ``start`` + v of a row, block ``number`` of its completion, and its ``states`` [K, v], initial first.

    The block's first token is the row's own in every state.
    """

    number: int
    start: int
    states: NDArray[Any]

    def mismatches(self, clean: NDArray[Any]) -> NDArray[Any]:
        """The first place [K] where each state differs from the row's own tokens ``clean`` [v]; v where it does not."""
        differs = self.states != clean
        return np.where(differs.any(1), differs.argmax(1), self.states.shape[1])


@dataclass(frozen=True, kw_only=True)
class RowStates:
    """The blocks of a row, and the data set's own completion where it has another one (``reference``)."""

    blocks: tuple[Block, ...]
    reference: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Noisy:
    """A chosen state of a block; ``following`` [v] is the state after it, where local consistency needs one."""

    number: int
    start: int
    tokens: NDArray[Any]
    following: NDArray[Any] | None = None


def noise_states(ids: NDArray[Any], *, span: tuple[int, int], block_size: int, generator: np.random.Generator) -> RowStates:
    """States without a model: a correct beginning of each length 1..v, then tokens drawn from the text before the block.

    Source: Jacobi Forcing's synthetic trajectories, which take the last 128 tokens of the context.
    """
    start, end = span
    blocks = []
    for number, first in enumerate(range(start, end, block_size)):
        clean = ids[first : min(first + block_size, end)]
        v, context = len(clean), ids[max(0, first - NOISE_CONTEXT) : first]
        drawn = context[generator.integers(len(context), size=(v, v))]
        known = np.arange(v)[None] <= np.arange(v)[:, None]  # state k keeps the first k + 1 tokens
        blocks.append(Block(number=number, start=first, states=np.where(known, clean, drawn)))
    return RowStates(blocks=tuple(blocks))

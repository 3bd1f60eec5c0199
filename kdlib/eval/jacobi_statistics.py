"""Counts of Jacobi decoding: tokens and passes by block, iterations of a block, what its trajectory says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kdlib.eval.acceptance_statistics import Estimate, Sums, ratio, sums

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class BlockCounts:
    """One block's trajectory s_0..s_K with fixed point y* = s_K; c_k is the length of the common prefix of s_k and y*.

    ``iterations``: K, those that changed the block. ``gained``: sum_k c_k - c_{k-1}, the tokens that became right in an
    unbroken prefix. ``stationary``: #{p : there is a k with p > c_k and s_m[p] = y*[p] for all m >= k}, tokens that were right
    for good while one before them was still wrong (Kou et al. 2024, CLLM).
    """

    iterations: int
    gained: int
    stationary: int


def block_counts(states: Tensor) -> BlockCounts:
    """The counts of ``states`` [K + 1, n]."""
    right = states == states[-1]
    prefix = right.cumprod(-1).sum(-1)  # c_k
    for_good = right.flip(0).cumprod(0).flip(0).bool()
    position = prefix.new_tensor(range(states.shape[1]))
    beyond = position > prefix[:, None]
    return BlockCounts(
        iterations=len(states) - 1,
        gained=int(prefix[-1] - prefix[0]),
        stationary=int((for_good & beyond).any(0).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class Trajectories:
    """Means over all blocks of more than one token; intervals over prompts.

    ``fast_forward``: c_k - c_{k-1}, tokens that an iteration which changes the block makes right in an unbroken prefix; 1 when
    nothing is guessed right ahead. ``fast_forwarded``: tokens of a block beyond one for each such iteration. ``stationary``:
    tokens of a block that were right for good while one before them was wrong.
    """

    blocks: int
    fast_forward: Estimate
    fast_forwarded: Estimate
    stationary: Estimate

    def to_json(self) -> dict[str, Any]:
        estimates = ("fast_forward", "fast_forwarded", "stationary")
        return {"blocks": self.blocks, **{name: getattr(self, name).to_json() for name in estimates}}


def trajectory_statistics(rows: Sequence[Sequence[Tensor]], *, resamples: int, seed: int) -> Trajectories | None:
    """Of every prompt's blocks [K + 1, n]; None when no iteration changed any of them."""
    found = [[block_counts(states) for states in row if states.shape[-1] > 1] for row in rows]
    blocks = [len(row) for row in found]
    iterations, gained, stationary = (
        [sum(getattr(block, name) for block in row) for row in found] for name in ("iterations", "gained", "stationary")
    )
    if not sum(iterations):
        return None
    ahead = [tokens - passes for tokens, passes in zip(gained, iterations, strict=True)]
    return Trajectories(
        blocks=sum(blocks),
        fast_forward=ratio(sums(gained, iterations), resamples=resamples, seed=seed),
        fast_forwarded=ratio(sums(ahead, blocks), resamples=resamples, seed=seed),
        stationary=ratio(sums(stationary, blocks), resamples=resamples, seed=seed),
    )


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Per prompt: ``lengths`` [P] new tokens, ``passes`` [P] without the prompt's, ``iterations`` [P, M] by block."""

    block_size: int
    lengths: Counts = field(repr=False)
    passes: Counts = field(repr=False)
    iterations: Counts = field(repr=False)

    @property
    def per_prompt(self) -> Sums:
        """(new tokens - 1, passes): the first token comes from the prompt's pass."""
        return sums(self.lengths - 1, self.passes)

    def of_block(self, block: int) -> Sums:
        """(tokens number b n + 1 to b n + n, passes begun in block b): a block's first token comes from the block before."""
        left = self.lengths - 1 - block * self.block_size
        return sums(left.clip(0, self.block_size), self.iterations[:, block])

    @property
    def distribution(self) -> list[tuple[int, int]]:
        """(iterations, number of blocks) of the blocks that took a pass."""
        values, counts = np.unique(self.iterations[self.iterations > 0], return_counts=True)
        return [(int(value), int(count)) for value, count in zip(values, counts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class OfBlock:
    """Block ``block`` of all responses: ``tokens`` over ``passes``, of the ``prompts`` that reached it."""

    block: int
    tokens_per_forward: Estimate
    tokens: int
    passes: int
    prompts: int

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "tokens_per_forward": self.tokens_per_forward.to_json()}


def by_block(counts: Passes, *, resamples: int, seed: int) -> tuple[OfBlock, ...]:
    """Blocks in which no pass began are left out."""
    blocks = range(counts.iterations.shape[1])
    return tuple(
        _block(block, of, resamples=resamples, seed=seed) for block in blocks if (of := counts.of_block(block)).per.any()
    )


def _block(block: int, of: Sums, *, resamples: int, seed: int) -> OfBlock:
    return OfBlock(
        block=block,
        tokens_per_forward=ratio(of, resamples=resamples, seed=seed),
        tokens=int(of.of.sum()),
        passes=int(of.per.sum()),
        prompts=int((of.per > 0).sum()),
    )


def iterations_per_block(counts: Passes, *, resamples: int, seed: int) -> Estimate:
    """Mean passes of a block that took one."""
    return ratio(sums(counts.iterations.sum(1), (counts.iterations > 0).sum(1)), resamples=resamples, seed=seed)

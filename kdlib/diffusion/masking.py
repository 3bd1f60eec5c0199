"""Ways of masking a response: from token rows and each row's own uniform draws to a step's noise; torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.diffusion.noise import Noise, Rows

KINDS = ("uniform", "response", "blocks", "per_block", "monotone", "trajectory")
MONOTONE = (0.2, 0.7)  # D2F's code: where the first block's share is drawn from, and the bound of the others


@dataclass(frozen=True, kw_only=True)
class Draws:
    """Uniform draws in [0, 1) of each row: ``row`` [B, 3]; ``block`` [B, R] by the number of a block; ``token`` [B, R] by the
    rank of a token. Found by number, they are the same whatever the row is padded or batched with.
    """

    row: Tensor
    block: Tensor
    token: Tensor

    @staticmethod
    def of(seeds: Sequence[int], *, length: Tensor) -> Draws:
        """The draws of rows with ``length`` [B] maskable tokens, each from a generator of its own seed; on length's device."""
        sizes = length.tolist()
        row = torch.zeros(len(sizes), 3)
        block, token = torch.zeros(2, len(sizes), max(1, *sizes, 0))
        for i, (seed, size) in enumerate(zip(seeds, sizes, strict=True)):
            drawn = torch.rand(3 + 2 * size, generator=torch.Generator().manual_seed(seed))
            row[i], block[i, :size], token[i, :size] = drawn.split([3, size, size])
        return Draws(row=row.to(length.device), block=block.to(length.device), token=token.to(length.device))


@dataclass(frozen=True, kw_only=True)
class Masking:
    """A way of masking. Blocks hold ``block_length`` maskable tokens by rank; t, k and r are drawn for each row.

    uniform: p = (1 - eps) t + eps, t ~ U(0, 1), on the whole response (LLaDA, arXiv 2502.09992).
    response: p = ``mask_ratio`` on the whole response (dParallel's Dream).
    blocks: p = (1 - eps) mask_ratio + eps in block k, uniform over the row's blocks, the last perhaps shorter; what is before
    it is clean, all behind it is tail (dParallel's LLaDA, arXiv 2509.26488, whose code writes a row's block into all rows and
    draws an empty one with probability 1 / (n + 1) where the response fills its n blocks).
    per_block: a t of its own for each block (BD3LM, arXiv 2503.09573).
    monotone: p_0 ~ U(0.2, 0.7), each further block higher by U(0, 1) (0.7 - p_0) / (n - 1), n the row's own number of blocks
    (D2F, arXiv 2508.09192; in its code n is that of the batch's longest row).
    trajectory: in block k, drawn as in blocks, the round(r size) tokens, at least one, that the teacher committed last;
    r ~ U(lo, hi) with (min, hi) = ``ratio_range`` and lo rising linearly from min to hi over training. Equal steps are ordered
    at random, unknown ones (0) count as last (d3LLM, arXiv 2601.07568, whose index reveals one token more than asked for).

    block_schedule: block lengths of equal parts of training, in the place of ``block_length`` (d3LLM goes from one to the next
    gradually).

    Raises ValueError for fields out of range.
    """

    kind: str = "uniform"
    mask_ratio: float = 0.5
    ratio_range: tuple[float, float] = (0.0, 0.8)
    block_length: int = 32
    block_schedule: tuple[int, ...] | None = None
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"masking {self.kind!r}: choose {', '.join(KINDS)}")
        if not 0.0 < self.mask_ratio <= 1.0:
            raise ValueError(f"mask_ratio must be above 0 and at most 1, not {self.mask_ratio}")
        if not 0.0 <= self.ratio_range[0] <= self.ratio_range[1] <= 1.0:
            raise ValueError(f"ratio_range needs 0 <= min <= max <= 1, not {list(self.ratio_range)}")
        if self.block_schedule is not None and not self.block_schedule:
            raise ValueError("block_schedule is empty: give block lengths, or leave it out")
        if min(self.block_schedule or (self.block_length,)) < 1:
            raise ValueError("block_length and those of block_schedule must be at least 1")
        if not 0.0 < self.eps < 1.0:
            raise ValueError(f"eps must be above 0 and below 1, not {self.eps}")

    def block_length_at(self, progress: float) -> int:
        """Tokens of a block when ``progress`` (0 to 1) of training is done."""
        if self.block_schedule is None:
            return self.block_length
        return self.block_schedule[min(int(progress * len(self.block_schedule)), len(self.block_schedule) - 1)]

    def noise(self, rows: Rows, draws: Draws, *, progress: float) -> Noise:
        """The noise of a step, when ``progress`` (0 to 1) of training is done.

        A row's noise follows from its own tokens and draws. A row without a maskable token has an empty segment. Raises
        ValueError for trajectory on rows without commit steps.
        """
        block, count = rows.blocks(self.block_length_at(progress))
        u = draws.token.gather(1, rows.rank.clamp(min=0))
        p = self._shares(draws, block, count)
        segment, tail = rows.maskable, torch.zeros_like(rows.maskable)
        if self.kind in ("blocks", "trajectory"):
            chosen = torch.minimum((draws.row[:, 0] * count).long(), count - 1)[:, None]  # the product may round up to count
            segment, tail = rows.maskable & (block == chosen), rows.maskable & (block > chosen)
        if self.kind == "trajectory":
            if rows.commit_step is None:
                raise ValueError("masking trajectory needs rows with commit_step: write them with kdlib trajectories diffusion")
            ratio = self._ratio(draws.row[:, 1], progress)
            u, p = _committed_last(rows.commit_step, u=u, segment=segment, ratio=ratio)
        return Noise(rows=rows, u=u, p=p, segment=segment, tail=tail, v=draws.row[:, 2])

    def _shares(self, draws: Draws, block: Tensor, count: Tensor) -> Tensor:
        """p [B, S] of every kind but trajectory."""
        if self.kind == "uniform":
            return self._above_eps(draws.row[:, :1]).expand(block.shape)
        if self.kind == "per_block":
            return self._above_eps(draws.block).gather(1, block.clamp(min=0))
        if self.kind == "monotone":
            return _rising(draws, count).gather(1, block.clamp(min=0))
        ratio = draws.row.new_tensor(self.mask_ratio)
        return (ratio if self.kind == "response" else self._above_eps(ratio)).expand(block.shape)

    def _above_eps(self, t: Tensor) -> Tensor:
        return (1.0 - self.eps) * t + self.eps

    def _ratio(self, draw: Tensor, progress: float) -> Tensor:
        least, most = self.ratio_range
        low = least + (most - least) * progress
        return low + (most - low) * draw


def _rising(draws: Draws, count: Tensor) -> Tensor:
    """[B, R] the share of each block, not below that of the one before."""
    least, most = MONOTONE
    first = least + (most - least) * draws.row[:, :1]
    step = (most - first) / (count[:, None] - 1).clamp(min=1)
    return first + step * (draws.block.cumsum(1) - draws.block[:, :1])


def _committed_last(commit_step: Tensor, *, u: Tensor, segment: Tensor, ratio: Tensor) -> tuple[Tensor, Tensor]:
    """(u, p) [B, S] that mask exactly round(ratio size) of a segment's tokens, at least one: those of the last steps."""
    latest = commit_step.new_tensor(torch.iinfo(torch.int64).max, dtype=torch.int64)
    step = torch.where(commit_step == 0, latest, commit_step.long())
    by_u = u.argsort(dim=1, stable=True)
    key = torch.where(segment, -step, 1).gather(1, by_u)  # steps are positive, so what is outside of the segment comes last
    order = by_u.gather(1, key.argsort(dim=1, stable=True))
    place = torch.empty_like(order).scatter_(1, order, torch.arange(u.shape[1], device=u.device).expand_as(order))
    size = segment.sum(1)
    masked = torch.minimum((ratio * size + 0.5).long().clamp(min=1), size)
    whole = size.clamp(min=1)[:, None]
    return (place.to(u.dtype) + 0.5) / whole, (masked[:, None].to(u.dtype) / whole).expand(u.shape)

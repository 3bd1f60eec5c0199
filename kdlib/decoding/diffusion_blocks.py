"""Which columns of a canvas, prompt and response, belong to which block."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdlib.diffusion.spec import DiffusionSpec


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Block k of a row is its response's columns k n - offset .. (k + 1) n - offset - 1, as far as there are such columns.

    n is ``block_length``; ``offset`` [b] the prompt's tokens in block 0; ``start`` the canvas column of the responses' first
    token, ``length`` all columns of the canvas; ``padding`` [b]: unused columns on a row's left. All tensors are on the CPU.
    """

    block_length: int
    start: int
    length: int
    padding: Tensor
    offset: Tensor

    @staticmethod
    def of(spec: DiffusionSpec, *, block_length: int, start: int, gen_length: int, padding: Tensor) -> Blocks:
        offset = (start - padding) % block_length if spec.blocks_from == "sequence" else torch.zeros_like(padding)
        return Blocks(block_length=block_length, start=start, length=start + gen_length, padding=padding, offset=offset)

    @property
    def gen_length(self) -> int:
        return self.length - self.start

    @property
    def count(self) -> Tensor:
        """[b] blocks of each response."""
        return (self.gen_length - 1 + self.offset) // self.block_length + 1

    def __getitem__(self, rows: Tensor) -> Blocks:
        return replace(self, padding=self.padding[rows], offset=self.offset[rows])

    def number(self, column: Tensor) -> Tensor:
        """The blocks [b, n] of response columns [b, n]."""
        return (column + self.offset[:, None]) // self.block_length

    def first(self, block: Tensor) -> Tensor:
        """[b] the response column at which block ``block`` [b] begins; below 0 where the prompt's end belongs to it."""
        return block * self.block_length - self.offset

    def order(self, spec: DiffusionSpec) -> Tensor:
        """[b, length] what a column may not exceed in what it sees: its block's number if blocks are causal, else 0."""
        columns = (torch.arange(self.length) - self.start).expand(len(self.offset), -1)
        if spec.attention == "full":
            return torch.zeros_like(columns)
        block = self.number(columns)
        return block if spec.blocks_from == "sequence" else block.clamp(min=-1)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The columns of b rows that may be committed in a pass: those of ``live`` blocks from ``current`` [b] on.

    ``first`` and ``end`` [b]: response columns first .. end - 1; ``boundary`` [b]: the canvas column at which block ``current``
    begins, before which all is known.
    """

    blocks: Blocks
    current: Tensor
    live: int

    @property
    def boundary(self) -> Tensor:
        return self.blocks.start + self.blocks.first(self.current)

    @property
    def first(self) -> Tensor:
        return self.blocks.first(self.current).clamp(min=0)

    @property
    def end(self) -> Tensor:
        return self.blocks.first(self.current + self.live).clamp(max=self.blocks.gen_length)

    def __getitem__(self, rows: Tensor) -> Window:
        return replace(self, blocks=self.blocks[rows], current=self.current[rows])

    def columns(self) -> tuple[Tensor, Tensor]:
        """Response columns [b, n], the last one again where a row's window is shorter, and their blocks [b, n], -1 there."""
        first, end = self.first[:, None], self.end[:, None]
        column = first + torch.arange(int((end - first).max()))
        block = self.blocks.number(column).masked_fill(column >= end, -1)
        return torch.minimum(column, end - 1), block

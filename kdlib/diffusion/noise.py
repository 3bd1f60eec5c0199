"""Which tokens of a response are masked in a training step; torch alone.

Every way of masking gives the same three things, and what methods need follows from them: a token is masked where
``u`` < ``p``; the complementary view masks the others; a smaller threshold on the same ``u`` gives a mask inside the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Token rows before they are masked, [B, S] each.

    ``ids``; ``maskable``: the response with its learnt padding; ``rank``: a maskable token's number among the row's maskable
    ones, from 0, and -1 elsewhere; ``commit_step``: the step in which the teacher committed it, from 1, 0 where unknown; None
    without trajectories. ``length`` [B]: maskable tokens of each row. ``visible``: tokens that are no padding; None: all.
    ``before`` [B]: tokens in front of the first maskable one, where blocks are counted from the sequence's first token; None
    where they begin with the response.
    """

    ids: Tensor
    maskable: Tensor
    rank: Tensor
    length: Tensor
    commit_step: Tensor | None = None
    visible: Tensor | None = None
    before: Tensor | None = None

    def blocks(self, block_length: int) -> tuple[Tensor, Tensor]:
        """[B, S] the block of each maskable token, from 0, and -1 elsewhere; [B] how many blocks a row has, none empty."""
        offset = self.length.new_zeros(()) if self.before is None else self.before % block_length
        block = (self.rank + offset.reshape(-1, 1)) // block_length
        count = (self.length + offset + block_length - 1) // block_length
        return block.masked_fill(~self.maskable, -1), count.masked_fill(self.length == 0, 0)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """``u`` [B, S] in [0, 1) of each token, ``p`` [B, S] the share of tokens that are masked there; ``segment`` [B, S]: the
    tokens that are masked or not by chance, and may be scored; ``tail`` [B, S]: those behind the segment, masked in every view
    and never scored. ``v`` [B] in [0, 1): one more draw of each row, for methods that need it.
    """

    rows: Rows
    u: Tensor
    p: Tensor
    segment: Tensor
    tail: Tensor
    v: Tensor

    def masked(self, share: float | Tensor = 1.0) -> Tensor:
        """[B, S] the segment's tokens with u < share * p; share <= 1 gives a mask inside that of share 1."""
        return self.segment & (self.u < share * self.p)

    @property
    def complement(self) -> Tensor:
        """[B, S] the segment's tokens that ``masked()`` leaves."""
        return self.segment & ~self.masked()

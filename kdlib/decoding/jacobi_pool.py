"""Rejection recycling: what a pass predicted beyond its first wrong token may be right further on."""

from __future__ import annotations

import torch
from torch import Tensor

_NONE = -1  # no token has this id


class NgramPool:
    """The last ``size`` rejected greedy tails of b rows, up to n tokens each (Jacobi Forcing's n-gram pool)."""

    def __init__(self, rows: int, *, size: int, n: int, device: torch.device) -> None:
        self.tails = torch.full((rows, size, n), _NONE, device=device)

    def alternatives(self, buffer: Tensor, *, width: Tensor) -> tuple[Tensor, Tensor]:
        """Other continuations [b, size, W] of the first token of ``buffer`` [b, W], and which of them are any [b, size].

        A tail that contains the token gives what follows its first occurrence there, then the buffer's own tokens; what is the
        buffer itself within its ``width`` [b] is none.
        """
        known = self.tails == buffer[:, :1, None]
        index = known.int().argmax(-1, keepdim=True) + torch.arange(buffer.shape[1], device=buffer.device)
        n = self.tails.shape[-1]
        following = self.tails.gather(-1, index.clamp(max=n - 1)).masked_fill(index >= n, _NONE)
        own = buffer[:, None].expand_as(following)
        found = torch.where((following == _NONE) | ~known.any(-1, keepdim=True), own, following)
        inside = torch.arange(buffer.shape[1], device=buffer.device) < width[:, None, None]
        return found, ((found != own) & inside).any(-1)

    def add(self, tails: Tensor, *, lengths: Tensor) -> None:
        """Takes in the first ``lengths`` [b] of ``tails`` [b, m]; those of fewer than two tokens continue nothing."""
        n = self.tails.shape[-1]
        tails = torch.nn.functional.pad(tails[:, :n], (0, max(n - tails.shape[1], 0)), value=_NONE)
        tails = tails.masked_fill(torch.arange(n, device=tails.device) >= lengths[:, None], _NONE)
        newer = torch.cat([self.tails, tails[:, None]], dim=1)[:, 1:]
        self.tails = torch.where(lengths[:, None, None] > 1, newer, self.tails)

    def keep(self, rows: Tensor) -> None:
        """Rows ``rows`` [b'] go on."""
        self.tails = self.tails[rows]

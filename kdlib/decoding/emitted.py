"""New tokens of rows that get several of them a pass: what is taken up, and which rows go on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Emitted:
    """``new`` [B, max_tokens + spare] tokens of B prompts, of which ``lengths`` [B] are known; ``rows`` [b]: who goes on.

    ``prompts`` [B]: the prompts' lengths; a row ends at ``max_tokens``, at the end of the ``context``, or with a token of
    ``stop_ids``. ``spare``: by how many tokens one ``take`` may offer more than one.
    """

    def __init__(self, prompts: Tensor, *, max_tokens: int, context: float, stop_ids: Sequence[int], spare: int) -> None:
        self.limits = (context - prompts).clamp(max=max_tokens).long()
        self.stop = torch.tensor(stop_ids, dtype=torch.long, device=prompts.device)
        # a pass writes all of its columns: what follows a row's last token is written over, or masked out at the end
        self.new = prompts.new_zeros(len(prompts), max_tokens + spare)
        self.lengths, self.max_tokens = torch.zeros_like(prompts), max_tokens
        self.rows = torch.arange(len(prompts), device=prompts.device)

    def take(self, tokens: Tensor, *, accepted: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        """Takes up each row's first ``accepted`` + 1 of ``tokens`` [b, n], but none after a stop token or its limit.

        Returns, on the CPU, the indices [b'] into the batch of those that go on, and their part of ``beside`` [b, k]: whatever
        integers the loop needs there, so that a pass waits for the device once.
        """
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        before = self.lengths[self.rows]
        self.new[self.rows[:, None], before[:, None] + columns] = tokens
        stops = torch.isin(tokens, self.stop) & (columns <= accepted[:, None])
        stopped = stops.any(-1)
        count = torch.where(stopped, stops.int().argmax(-1), accepted) + 1
        limits = self.limits[self.rows]
        lengths = torch.minimum(before + count, limits)
        self.lengths[self.rows] = lengths
        alive = ~stopped & (lengths < limits)
        moved = torch.cat([alive[:, None].long(), beside], dim=1).cpu()  # the pass's one wait
        kept = moved[:, 0].nonzero()[:, 0]
        self.rows = self.rows[kept.to(self.rows.device)]
        return kept, moved[kept, 1:]

    def sequences(self, input_ids: Tensor, *, pad_token_id: int) -> Tensor:
        """[B, S + max_tokens]: ``input_ids`` [B, S], new tokens, padding."""
        columns = torch.arange(self.max_tokens, device=self.new.device)
        new = self.new[:, : self.max_tokens].masked_fill(columns >= self.lengths[:, None], pad_token_id)
        return torch.cat([input_ids, new], dim=1)


def leading(stands: Tensor) -> Tensor:
    """How many of the first columns are all true [b]; ``stands`` [b, n]."""
    return stands.long().cumprod(-1).sum(-1)

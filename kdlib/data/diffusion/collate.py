"""Token rows of a diffusion language model -> a batch, with the learnt padding behind their responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from kdlib.data.collate import DistillationCollator
from kdlib.data.draft import UNSCORED, first_scored
from kdlib.diffusion.spec import BlocksFrom, EosPadding


@dataclass(frozen=True)
class DiffusionCollator:
    """Pads prepared rows to a rectangle [B, S], behind them what a model learns to fill a response with.

    The batch is that of ``DistillationCollator``: ``input_ids``, ``attention_mask``, ``labels`` (the token's own id where it
    may be masked, -100 elsewhere) and ``sequence`` (the row's number) [B, S], and ``sample_id`` [B]. Added are ``rank`` [B, S],
    the number of a maskable token among its row's, -1 elsewhere; and, of rows with ``commit_step`` (a list over their maskable
    tokens), ``commit_step`` [B, S], 0 elsewhere.

    Behind a response that ends with ``eos_token_id`` or one of ``end_token_ids``, maskable EOS tokens follow, with the commit
    step of its last token: up to a whole block ("block"), to ``response_length`` tokens of response, or without that to a row
    of ``max_length`` ("length"), or not at all ("none"); never beyond a row of ``max_length``. A response that was cut has no
    end to learn. What a row has behind its last maskable token is left out: read both ways, it tells where the response ends.
    """

    pad_token_id: int
    _: KW_ONLY
    eos_token_id: int | None
    eos_padding: EosPadding
    block_length: int
    max_length: int
    response_length: int | None = None
    blocks_from: BlocksFrom = "response"
    end_token_ids: tuple[int, ...] = ()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        filled = [self._filled(row) for row in rows]
        batch = DistillationCollator(self.pad_token_id)(filled)
        maskable = batch["labels"] != UNSCORED
        batch["rank"] = torch.where(maskable, maskable.cumsum(1) - 1, -1)
        if "commit_step" in rows[0]:
            batch["commit_step"] = _on_tokens([row["commit_step"] for row in rows], batch["rank"])
        return batch

    def _filled(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row up to its last maskable token, and the learnt padding."""
        labels = list(row["labels"])
        end = next((i for i in range(len(labels), 0, -1) if labels[i - 1] != UNSCORED), 0)
        if not end:  # a prompt to be answered
            return {**row}
        padding = [self.eos_token_id] * self._missing(labels[:end])
        return {**row, "input_ids": [*row["input_ids"][:end], *padding], "labels": labels[:end] + padding}

    def _missing(self, labels: Sequence[int]) -> int:
        """How many tokens of padding follow a row of these labels, the last of which is scored."""
        if self.eos_token_id is None or labels[-1] not in (self.eos_token_id, *self.end_token_ids):
            return 0
        room, response = max(0, self.max_length - len(labels)), sum(label != UNSCORED for label in labels)
        if self.eos_padding == "block":
            before = first_scored(labels) if self.blocks_from == "sequence" else 0
            return min(room, -(before + response) % self.block_length)
        if self.eos_padding == "length":
            return room if self.response_length is None else min(room, max(0, self.response_length - response))
        return 0


def _on_tokens(steps: Sequence[Sequence[int]], rank: Tensor) -> Tensor:
    """[B, S] the step of each maskable token by its ``rank`` [B, S]; the last one's for those behind it."""
    filled = [list(row) or [0] for row in steps]  # a row without a response has none
    width = max(map(len, filled))
    table = torch.tensor([row + row[-1:] * (width - len(row)) for row in filled])
    return table.gather(1, rank.clamp(0, width - 1)).masked_fill(rank < 0, 0)

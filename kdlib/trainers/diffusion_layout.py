"""What a diffusion model reads of masked rows, and where it says a token: full attention, or blocks in one or two streams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdlib.diffusion.spec import DiffusionSpec
from kdlib.streams import CLEAN, PADDING

Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How rows [B, S] are laid out for a model of ``spec``; ``clean``: masked blocks see the text of the blocks before them.

    With full attention the rows are read as they are. Block-causal rows carry the number of each token's block in ``order``.
    With ``clean`` the text is the first stream, and behind it, one stream for each block, stand the blocks with learnt tokens,
    masked: a row has S + R columns, R the most tokens of such blocks (BD3LM, arXiv 2503.09573).
    """

    spec: DiffusionSpec
    clean: bool = False

    def inputs(self, masked_ids: Tensor, batch: Batch) -> Batch:
        """What the model reads of ``masked_ids`` [B, S], rows of ``batch``."""
        attended = batch["attention_mask"]
        if self.spec.attention == "full":
            return {"input_ids": masked_ids, "attention_mask": attended}
        S = masked_ids.shape[1]
        order, position = self.order(batch), torch.arange(S).expand_as(masked_ids)
        stream = torch.where(attended.bool(), CLEAN, PADDING)
        beyond = torch.full_like(order, int(order.max()) + 1)
        text = {"order": order, "position_ids": position, "stream": stream, "clean_until": beyond}
        if not self.clean:
            return {"input_ids": masked_ids, "attention_mask": attended, **text}
        columns, there = _columns(self._masked(batch))
        response = {name: x.gather(1, columns) for name, x in {"input_ids": masked_ids, **text}.items()}
        response |= {"clean_until": response["order"], "stream": torch.where(there, 1 + response["order"], PADDING)}
        both = {"input_ids": batch["input_ids"], **text}
        made = {name: torch.cat([x, response[name]], dim=1) for name, x in both.items()}
        return {**made, "attention_mask": torch.cat([attended, there.to(attended)], dim=1)}

    def read_at(self, batch: Batch) -> tuple[Tensor, int]:
        """The column [B, S] whose hidden state says each token of a row, and how many columns a row has."""
        S = batch["input_ids"].shape[1]
        columns = torch.arange(S).expand_as(batch["input_ids"])
        if not self.clean:
            return (columns - int(self.spec.shift)).clamp(min=0), S
        masked = self._masked(batch)
        number, width = masked.cumsum(1) - 1, S + _columns(masked)[0].shape[1]
        if not self.spec.shift:
            return S + number.clamp(min=0), width
        # the first token of a block is said by the text before it, the others by their masked block
        order = self.order(batch)
        inside = torch.zeros_like(order, dtype=torch.bool)
        inside[:, 1:] = order[:, 1:] == order[:, :-1]
        return torch.where(inside, S + (number - 1).clamp(min=0), (columns - 1).clamp(min=0)), width

    def _masked(self, batch: Batch) -> Tensor:
        """The tokens [B, S] of blocks with a learnt one: with blocks from the sequence's start, also a prompt's last ones."""
        order, learnt = self.order(batch), batch["rank"] >= 0
        held = order.new_zeros(len(order), int(order.max()) + 1).scatter_add_(1, order, learnt.long())
        return (held.gather(1, order) > 0) & batch["attention_mask"].bool()

    def order(self, batch: Batch) -> Tensor:
        """The number of each token's block [B, S]: from the sequence's start, or a new one at each turn of learnt text."""
        learnt, columns = batch["rank"] >= 0, torch.arange(batch["rank"].shape[1])
        size = self.spec.block_length
        assert size is not None
        if self.spec.blocks_from == "sequence":
            return (columns // size).expand_as(batch["rank"])
        turns = torch.ones_like(learnt)
        turns[:, 1:] = learnt[:, 1:] != learnt[:, :-1]
        since = columns - torch.where(turns, columns, 0).cummax(1).values
        return (turns | (learnt & (since % size == 0))).long().cumsum(1)


def _columns(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The columns [B, R] of each row's ``chosen`` tokens [B, S] in their order, and which of the R there are."""
    length = chosen.sum(1)
    R = max(int(length.max()), 1)
    return chosen.int().argsort(dim=1, descending=True, stable=True)[:, :R], torch.arange(R) < length[:, None]

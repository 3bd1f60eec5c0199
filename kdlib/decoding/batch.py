"""A left-padded batch of rows being decoded, with its key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class Batch:
    """Reads prompts, then one token of each row at a time; the state of all rows stays on the model's device.

    ``rows`` [b]: which of the B prompts are still in the batch; ``logits`` [b, V]: of their next token; ``limits`` [B]: how
    many tokens each prompt may get. Prompts given several times are read once, and their rows share the result.
    """

    def __init__(self, model: Any, prompts: Sequence[list[int]], *, limits: list[int], pad_token_id: int) -> None:
        self.model, self.device = model, next(model.parameters()).device
        self.rows, self.limits = torch.arange(len(prompts), device=self.device), torch.tensor(limits, device=self.device)
        distinct = {prompt: index for index, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        self._read(list(distinct), steps=max(limits), pad_token_id=pad_token_id)
        if len(distinct) < len(prompts):
            self._select(torch.tensor([distinct[tuple(prompt)] for prompt in prompts], device=self.device))
        self._last = self._position + self.limits  # where a row's last token would be

    def _read(self, prompts: list[tuple[int, ...]], *, steps: int, pad_token_id: int) -> None:
        """One forward pass over all prompts; the mask of all later ones is made here."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        self._past = longest = max(map(len, prompts))
        padding = longest - lengths[:, None]
        columns = torch.arange(longest + steps, device=self.device)
        padded = any(len(prompt) < longest for prompt in prompts)
        self._mask = columns >= padding if padded else None  # [b, longest + steps]
        self._position = lengths - 1
        self._cache = DynamicCache(config=self.model.config)
        ids = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        output = self.model(
            input_ids=torch.tensor(ids, device=self.device),
            attention_mask=None if self._mask is None else self._mask[:, :longest].long(),
            position_ids=(columns[:longest] - padding).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]
        self._prepared = self._mask is not None and self._takes_prepared_masks()

    def _takes_prepared_masks(self) -> bool:
        """Whether [b, 1, 1, past] can be given in place of [b, past], from which each pass would make it anew."""
        plain = all(type(layer) is DynamicLayer for layer in self._cache.layers)  # a sliding window has a mask of its own
        return plain and self.model._supports_attention_backend and self.model.config._attn_implementation == "sdpa"

    def step(self, chosen: Tensor) -> None:
        """Appends ``chosen`` [b]. Rows that have ended are fed too until they are dropped; what they say is never read."""
        self._past += 1
        self._position = torch.minimum(self._position + 1, self._last)
        mask = None if self._mask is None else self._mask[:, : self._past]
        if mask is not None:
            mask = mask[:, None, None] if self._prepared else mask.long()
        output = self.model(
            input_ids=chosen[:, None],
            attention_mask=mask,
            position_ids=self._position[:, None],
            past_key_values=self._cache,
            use_cache=True,
        )
        self.logits = output.logits[:, -1]

    def keep(self, kept: Tensor) -> None:
        """Drops all rows but ``kept`` (indices into the batch as it is)."""
        self.rows, self._last = self.rows[kept], self._last[kept]
        self._select(kept)

    def _select(self, rows: Tensor) -> None:
        self._cache.reorder_cache(rows)  # which, given fewer or repeated rows, selects; every kind of layer has it
        self.logits, self._position = self.logits[rows], self._position[rows]
        self._mask = None if self._mask is None else self._mask[rows]

"""Key-value caches of rows that move forward, and back, by different numbers of tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kdlib.decoding.sampling import context_length
from kdlib.models import check_causal


class RowCache:
    """Keys and values of b rows whose last tokens share a column: what a row lacks in length is padding on its left.

    Going back by different numbers of tokens moves the shorter rows to the right, so that differences of columns stay
    differences of positions and a sliding window sees what it should. Every layer keeps all columns: a window that was cut off
    could not be gone back into. ``length``: the columns read; ``padding`` [b]: how many of them a row does not use; on the CPU,
    as is all that says by how much rows move: an accelerator's queue then waits once a round. What reads tokens is a subclass.
    """

    def __init__(self, *, padding: Tensor, device: torch.device, context: float = math.inf) -> None:
        self.padding, self.length, self.device, self._cache = padding, 0, device, DynamicCache()
        self._last_position = int(min(context, torch.iinfo(torch.long).max)) - 1

    def extend(self, tokens: int) -> dict[str, Tensor | None]:
        """Makes room for ``tokens`` more columns: position_ids [b, tokens], and attention_mask [b, length] or None.

        Positions beyond the context are its last one; who calls does not use what comes of these tokens.
        """
        columns = torch.arange(self.length + tokens, device=self.device)
        padding = self.padding.to(self.device, non_blocking=True)[:, None]
        positions = (columns[self.length :] - padding).clamp(min=0, max=self._last_position)
        self.length += tokens
        mask = (columns >= padding).long() if self.padding.any() else None
        return {"attention_mask": mask, "position_ids": positions}

    def go_back(self, rows: Tensor, *, tokens: Tensor) -> None:
        """The batch becomes ``rows`` [b'] of it, some perhaps more than once, without the last ``tokens`` [b'] of each.

        Both lie on the CPU.
        """
        shift = tokens - tokens.min()
        padding = self.padding[rows] + shift
        end, start = self.length - int(tokens.min()), int(padding.min())
        if torch.equal(rows, torch.arange(len(self.padding))) and not shift.any():
            for layer in self._cache.layers:
                layer.keys, layer.values = layer.keys[:, :, start:end], layer.values[:, :, start:end]
        else:
            columns = (torch.arange(start, end) - shift[:, None]).clamp(min=0)
            self._gather(rows.to(self.device, non_blocking=True), columns.to(self.device, non_blocking=True))
        self.padding, self.length = padding - start, end - start

    def _gather(self, rows: Tensor, columns: Tensor) -> None:
        """Row r of the cache becomes ``columns`` [b', n] of row ``rows``[r]."""
        for layer in self._cache.layers:
            layer.keys, layer.values = (_taken(old, rows=rows, columns=columns) for old in (layer.keys, layer.values))


def _taken(states: Tensor, *, rows: Tensor, columns: Tensor) -> Tensor:
    """``columns`` [b', n] of ``rows`` [b'] of ``states`` [b, heads, length, width], as [b', heads, n, width].

    Whole vectors are copied from a flat view: ``gather``, which goes element by element, takes 30 times as long on a CPU.
    """
    heads, length, width = states.shape[1:]
    blocks = rows[:, None] * heads + torch.arange(heads, device=rows.device)
    index = blocks[:, :, None] * length + columns[:, None]
    return states.reshape(-1, width).index_select(0, index.flatten()).view(*index.shape, width)


class CachedModel(RowCache):
    """A causal language model (evaluation mode) that reads rows piece by piece."""

    def __init__(self, model: Any, *, padding: Tensor, layers: tuple[int, ...] = ()) -> None:
        super().__init__(padding=padding, device=next(model.parameters()).device, context=context_length(model))
        self.model, self.layers = model, layers

    def read(self, ids: Tensor, *, logits_to_keep: int = 0) -> tuple[Tensor, dict[int, Tensor]]:
        """Logits [b, n, V] after each of ``ids`` [b, n] (or after the last ``logits_to_keep``), and {layer: [b, n, D]}."""
        output = self.model(
            input_ids=ids,
            **self.extend(ids.shape[1]),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            output_hidden_states=bool(self.layers),
        )
        return output.logits, {layer: output.hidden_states[layer] for layer in self.layers}


def check_cache(model: Any, *, role: str) -> None:
    """Raises ValueError for a model that is not causal, or whose state cannot go back by tokens, as a recurrent one's."""
    check_causal(model, role=role)
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    unfit = kinds - {DynamicLayer, DynamicSlidingWindowLayer}
    if unfit:
        names = ", ".join(sorted(kind.__name__ for kind in unfit))
        raise ValueError(f"the {role} keeps a state that cannot go back ({names}): several tokens a pass need attention layers")

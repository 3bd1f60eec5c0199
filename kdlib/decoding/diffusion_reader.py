"""What a diffusion language model reads in a pass, and which keys and values it finds from earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kdlib.decoding.diffusion_blocks import Blocks, Window
from kdlib.diffusion.spec import DiffusionSpec
from kdlib.head import Head
from kdlib.models import inner
from kdlib.streams import CLEAN, PADDING, Streams, attention_mask

Cache = Literal["prefix", "dual", "free", "block"]


@dataclass(frozen=True, kw_only=True)
class Span:
    """Canvas columns lo .. hi - 1 that each row reads in a pass, as queries; ``keep``: those before it, keys and values of
    which are kept afterwards. [b] each, on the CPU.
    """

    lo: Tensor
    hi: Tensor
    keep: Tensor

    def __getitem__(self, rows: Tensor) -> Span:
        return Span(lo=self.lo[rows], hi=self.hi[rows], keep=self.keep[rows])


class Reader:
    """Logits of a window of columns: one forward pass over what has to be read, all the rest from ``cache``.

    None: every column that the window sees is read in every pass.
    "prefix" (Fast-dLLM, arXiv 2505.22618): a pass over all columns when a block begins, which keeps the keys of what is before
    the block; the other passes read from the block on. Approximates: with full attention, what is before the block depends on
    the block's own tokens, and stays as it was when they were masked.
    "dual" (the same paper): that first pass keeps all keys, the others read the window alone. Approximates also the columns
    behind the window, which stay as they were when the block began.
    "free" (FreeCache, arXiv 2505.21467): keys of the prompt and of finished blocks are kept for good, from the first pass that
    reads them complete; the others are read. Approximates: with full attention, they depend on all that comes later.
    "block": the same for block-causal attention, in which they do not: exact, and no pass more than without a cache.

    With block-causal attention all four are exact.
    """

    def __init__(self, model: nn.Module, *, spec: DiffusionSpec, blocks: Blocks, cache: Cache | None) -> None:
        base: Any = inner(model)
        self.spec, self.blocks, self.cache = spec, blocks, cache
        self.config, self.decoder, self.head = base.config, base.get_decoder(), Head.of(base)
        self.device = self.head.weight.device
        self.visible = (torch.arange(blocks.length) >= blocks.padding[:, None]).to(self.device)
        self.positions = (self.visible.long().cumsum(-1) - 1).clamp(min=0)
        self.order = blocks.order(spec).to(self.device)
        self.kept = torch.zeros_like(blocks.padding)  # columns before it are in the store
        self.store: list[tuple[Tensor, Tensor]] = []  # of each layer, [B, heads, length, width]

    def logits(self, canvas: Tensor, *, rows: Tensor, window: Window, begins: Tensor) -> Tensor:
        """[b, n, V] of the ``window``'s columns of ``rows`` [b] of ``canvas`` [B, L], MASK at -inf.

        ``begins`` [b]: whether the current block was not current in the row's pass before; on the CPU like ``rows``.
        """
        refresh = begins & (self.cache in ("prefix", "dual"))
        self.kept[rows[refresh]] = 0
        span = self._span(window, rows=rows, refresh=refresh)
        source = self.blocks.start + window.columns()[0] - int(self.spec.shift)
        parts = [part.nonzero()[:, 0] for part in (refresh, ~refresh) if part.any()]
        hidden = [self._hidden(canvas, rows=rows[part], span=span[part], source=source[part]) for part in parts]
        states = torch.cat(hidden)[torch.cat(parts).argsort().to(self.device)]
        logits = self.head(states.flatten(0, 1)).unflatten(0, states.shape[:2])
        logits[..., self.spec.mask_token_id] = -torch.inf
        return logits

    def _span(self, window: Window, *, rows: Tensor, refresh: Tensor) -> Span:
        boundary, end, kept = window.boundary, self.blocks.start + window.end, self.kept[rows]
        reach = torch.full_like(end, self.blocks.length) if self.spec.attention == "full" else end
        lo = torch.minimum(kept, boundary)
        if self.spec.shift:  # the first token's own hidden state is the column before it
            lo = torch.minimum(lo, self.blocks.start + window.first - 1)
        lo = torch.maximum(lo, self.blocks.padding[rows])
        if self.cache is None:
            return Span(lo=lo, hi=reach, keep=torch.zeros_like(end))
        if self.cache == "dual":
            return Span(lo=lo, hi=torch.where(refresh, reach, end), keep=torch.where(refresh, reach, kept))
        return Span(lo=lo, hi=reach, keep=boundary)

    def _hidden(self, canvas: Tensor, *, rows: Tensor, span: Span, source: Tensor) -> Tensor:
        """Hidden states [b, n, D] of the canvas columns ``source`` [b, n], each in its row's span."""
        width = int((span.hi - span.lo).max())
        columns = span.lo[:, None] + torch.arange(width)
        inside = (columns < span.hi[:, None]).to(self.device)
        columns = columns.clamp(max=self.blocks.length - 1).to(self.device)
        queries = Streams(
            position=self.order[rows].gather(1, columns),
            stream=torch.where(inside, CLEAN, PADDING),
            clean_until=torch.zeros_like(columns),
        )
        past, keys = self._past(queries, rows=rows, span=span)
        output = self.decoder(
            input_ids=canvas[rows].gather(1, columns),
            attention_mask=attention_mask(self.config, queries=queries, keys=keys),
            position_ids=self.positions[rows].gather(1, columns),
            past_key_values=past,
            use_cache=past is not None,
        )
        if past is not None:
            self._keep(past, rows=rows, span=span, columns=columns, inside=inside)
        index = (source - span.lo[:, None]).to(self.device)
        states = output.last_hidden_state
        return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[-1]))

    def _past(self, queries: Streams, *, rows: Tensor, span: Span) -> tuple[DynamicCache | None, Streams]:
        """Keys and values of the columns that are kept and not read again, and what all keys are: these, then the queries."""
        if self.cache is None:
            return None, queries
        past, kept = DynamicCache(), self.kept[rows]
        if not kept.any():
            return past, queries
        width = int(kept.max())
        column = torch.arange(width)
        used = (column < kept[:, None]) & ((column < span.lo[:, None]) | (column >= span.hi[:, None]))
        stream = torch.where(used.to(self.device) & self.visible[rows, :width], CLEAN, PADDING)
        for layer, states in enumerate(self.store):
            keys, values = (x[rows, :, :width] for x in states)
            past.update(keys, values, layer)
        position = torch.cat([self.order[rows, :width], queries.position], dim=1)
        stream = torch.cat([stream, queries.stream], dim=1)
        return past, Streams(position=position, stream=stream, clean_until=torch.zeros_like(position))

    def _keep(self, past: DynamicCache, *, rows: Tensor, span: Span, columns: Tensor, inside: Tensor) -> None:
        """Stores what the pass has computed of columns before ``span.keep`` that were not in the store."""
        kept = self.kept[rows]
        if not (span.keep > kept).any():
            return
        lower, upper = kept.to(self.device)[:, None], span.keep.to(self.device)[:, None]
        row, query = (inside & (columns >= lower) & (columns < upper)).nonzero(as_tuple=True)
        target, column, n = rows.to(self.device)[row], columns[row, query], columns.shape[1]
        if not self.store:
            shape = (len(self.kept), -1, self.blocks.length, -1)
            self.store = [(_empty(layer.keys, shape), _empty(layer.values, shape)) for layer in past.layers]
        for (keys, values), layer in zip(self.store, past.layers, strict=True):
            keys[target, :, column] = layer.keys[row, :, query - n]
            values[target, :, column] = layer.values[row, :, query - n]
        self.kept[rows] = torch.maximum(kept, span.keep)


def _empty(like: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    return like.new_zeros([old if new == -1 else new for old, new in zip(like.shape, shape, strict=True)])

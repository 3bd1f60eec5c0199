"""Several continuations of one text in one forward pass: a clean stream, noisy streams beside it, one attention mask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

CLEAN, PADDING = 0, -1
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True, kw_only=True)
class Streams:
    """What each of L tokens is, [B, L] int64 each.

    A token sees those of its own ``stream`` up to its own ``position``, and the clean text before position ``clean_until``:
    i sees j if position_j <= position_i and (stream_j = stream_i, or stream_j = CLEAN and position_j < clean_until_i).
    Columns have no order of their own. PADDING is seen by padding alone. Where tokens see whole blocks, ``position`` is the
    number of the block.
    """

    position: Tensor
    stream: Tensor
    clean_until: Tensor

    def __getitem__(self, columns: slice) -> Streams:
        """Some columns."""
        return Streams(**{name: x[:, columns] for name, x in vars(self).items()})


def attention_mask(config: Any, *, queries: Streams, keys: Streams) -> Any:
    """The mask that makes a transformers model of ``config`` see what its queries [B, Q] should of keys [B, K].

    A [B, 1, Q, K] tensor (boolean for sdpa, additive for eager) or a flex-attention BlockMask, by kind of layer where a model
    has several. Raises ValueError for attention that takes no mask of this kind, as flash attention does not, and for layers
    that are no attention.
    """
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())  # not every configuration has the entry
    if unknown := kinds - {FULL, SLIDING}:
        raise ValueError(f"several streams in one pass need attention layers, not {', '.join(sorted(unknown))}")
    window = getattr(text, "sliding_window", None)
    if len(kinds) < 2:
        return _mask(text, queries, keys, window=None if kinds == {FULL} else window)
    return {FULL: _mask(text, queries, keys, window=None), SLIDING: _mask(text, queries, keys, window=window)}


def _mask(config: Any, queries: Streams, keys: Streams, *, window: int | None) -> Any:
    attention = config._attn_implementation
    B, Q, K = len(keys.position), queries.position.shape[1], keys.position.shape[1]
    rule, device = _rule(queries, keys, window=window), keys.position.device
    if attention == "flex_attention":
        return create_block_mask(rule, B, None, Q, K, device=str(device))
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"several streams in one pass need attn_implementation sdpa, eager or flex_attention, not {attention}")
    b, q, k = (torch.arange(n, device=device) for n in (B, Q, K))
    visible = rule(b[:, None, None], 0, q[None, :, None], k[None, None])[:, None]
    if attention == "sdpa":
        return visible
    dtype = config.dtype or torch.float32
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)


def _rule(queries: Streams, keys: Streams, *, window: int | None) -> Callable[[Any, Any, Any, Any], Tensor]:
    """The mask as a function of (batch, head, query, key) indices, which flex attention asks for."""

    def visible(b: Any, h: Any, q: Any, k: Any) -> Tensor:
        position, before = queries.position[b, q], keys.position[b, k]
        clean = (keys.stream[b, k] == CLEAN) & (before < queries.clean_until[b, q])
        seen = (before <= position) & ((keys.stream[b, k] == queries.stream[b, q]) | clean)
        return seen if window is None else seen & (position - before < window)

    return visible

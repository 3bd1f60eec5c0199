"""Decoding loops over transformers models: token ids in, token ids out."""

from __future__ import annotations

from kdlib.lazy import exports

__all__ = ["draw", "filtered_log_probs", "generate"]

__getattr__ = exports(
    __name__,
    {
        "draw": "kdlib.decoding.sampling",
        "filtered_log_probs": "kdlib.decoding.sampling",
        "generate": "kdlib.decoding.sampling",
    },
)

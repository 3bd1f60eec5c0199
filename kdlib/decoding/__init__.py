"""Decoding loops over transformers models: token ids in, token ids out."""

from __future__ import annotations

from kdlib.lazy import exports

__all__ = [
    "Drafter",
    "EagleDrafter",
    "ModelDrafter",
    "SpeculativeOutput",
    "draw",
    "filtered_log_probs",
    "generate",
    "speculative_generate",
]

__getattr__ = exports(
    __name__,
    {
        "draw": "kdlib.decoding.sampling",
        "filtered_log_probs": "kdlib.decoding.sampling",
        "generate": "kdlib.decoding.sampling",
        "EagleDrafter": "kdlib.decoding.eagle_drafter",
        "Drafter": "kdlib.decoding.drafters",
        "ModelDrafter": "kdlib.decoding.drafters",
        "SpeculativeOutput": "kdlib.decoding.speculative",
        "speculative_generate": "kdlib.decoding.speculative",
    },
)

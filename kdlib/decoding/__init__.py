"""Decoding loops over transformers models: token ids in, token ids out."""

from __future__ import annotations

from kdlib.lazy import exports

__all__ = [
    "DiffusionDecoder",
    "DiffusionOutput",
    "Drafter",
    "EagleDrafter",
    "JacobiOutput",
    "ModelDrafter",
    "PackedStates",
    "SpeculativeOutput",
    "diffusion_generate",
    "draw",
    "filtered_log_probs",
    "generate",
    "jacobi_generate",
    "packed_states",
    "speculative_generate",
]

__getattr__ = exports(
    __name__,
    {
        "DiffusionDecoder": "kdlib.decoding.diffusion_decoder",
        "DiffusionOutput": "kdlib.decoding.diffusion",
        "diffusion_generate": "kdlib.decoding.diffusion",
        "draw": "kdlib.decoding.sampling",
        "filtered_log_probs": "kdlib.decoding.sampling",
        "generate": "kdlib.decoding.sampling",
        "EagleDrafter": "kdlib.decoding.eagle_drafter",
        "JacobiOutput": "kdlib.decoding.jacobi",
        "jacobi_generate": "kdlib.decoding.jacobi",
        "PackedStates": "kdlib.decoding.jacobi_states",
        "packed_states": "kdlib.decoding.jacobi_states",
        "Drafter": "kdlib.decoding.drafters",
        "ModelDrafter": "kdlib.decoding.drafters",
        "SpeculativeOutput": "kdlib.decoding.speculative",
        "speculative_generate": "kdlib.decoding.speculative",
    },
)

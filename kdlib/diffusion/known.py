"""The spec of a model from its configuration: the one kdlib wrote there, or that of a published model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kdlib.diffusion.spec import DiffusionSpec
from kdlib.layouts import original_of
from kdlib.models import eos_ids


def _blocks(mask_token_id: int, *, eos_token_id: int, block_length: int, **more: Any) -> DiffusionSpec:
    """Block diffusion whose blocks start with the text, the prompt in them."""
    return DiffusionSpec(
        mask_token_id=mask_token_id,
        attention="block_causal",
        block_length=block_length,
        blocks_from="sequence",
        eos_token_id=eos_token_id,
        eos_padding="block",
        **more,
    )


# model_type of config.json -> the published models' values, for what config.json does not say. Sources: GSAI-ML/LLaDA-8B-*;
# Dream-org/Dream-v0-*; inclusionAI/LLaDA-MoE-7B-A1B-* (its model_type is llada, too) and LLaDA2.0-*; JetLM/SDAR-*;
# Efficient-Large-Model/Fast_dLLM_v2_*; google/diffusiongemma-*.
PUBLISHED = {
    "llada": DiffusionSpec(mask_token_id=126336, eos_token_id=126081, layout="llada"),
    "Dream": DiffusionSpec(mask_token_id=151666, eos_token_id=151643, shift=True, layout="dream"),
    "llada_moe": DiffusionSpec(mask_token_id=156895, eos_token_id=156892),
    "llada2_moe": _blocks(156895, eos_token_id=156892, block_length=32),
    "sdar": _blocks(151669, eos_token_id=151643, block_length=4, layout="sdar"),
    "sdar_moe": _blocks(151669, eos_token_id=151643, block_length=4),
    "Fast_dLLM_Qwen": _blocks(151665, eos_token_id=151645, block_length=32, shift=True, layout="fast_dllm"),
    "diffusion_gemma": DiffusionSpec(
        mask_token_id=None, attention="canvas", block_length=256, eos_token_id=1, eos_padding="none"
    ),
}
_BLOCK_KEYS = ("block_size", "bd_size", "canvas_length")


def known_spec(config: Any) -> DiffusionSpec | None:
    """As ``spec_of``; None for a configuration of no diffusion model."""
    try:
        return spec_of(config)
    except ValueError:
        return None


def spec_of(config: Any) -> DiffusionSpec:
    """The DiffusionSpec of a transformers configuration; ValueError for one that is of no diffusion model kdlib knows.

    What kdlib has written itself says so under ``diffusion``; published models are known by their model_type, and their own
    mask token, end token and block length go before the table's.
    """
    written = getattr(config, "diffusion", None)  # not every configuration has the entry
    if written is not None:
        return DiffusionSpec.from_json(written)
    said = original_of(config) or config.to_dict()
    kind = "llada_moe" if said.get("model_type") == "llada" and said.get("num_experts") else said.get("model_type")
    if kind not in PUBLISHED:
        raise ValueError(
            f"{config.name_or_path or config.model_type} is no diffusion language model that kdlib knows: "
            "train it as one with kdlib diffusion (--mask_token), or give its DiffusionSpec"
        )
    return replace(PUBLISHED[kind], **_own_values(PUBLISHED[kind], said))


def _own_values(spec: DiffusionSpec, said: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if spec.mask_token_id is not None and said.get("mask_token_id") is not None:
        found["mask_token_id"] = said["mask_token_id"]
    if ends := eos_ids(said.get("eos_token_id")):
        found["eos_token_id"] = ends[0]
    lengths = [said[key] for key in _BLOCK_KEYS if said.get(key) is not None]
    if spec.block_length is not None and lengths:
        found["block_length"] = lengths[0]
    return found

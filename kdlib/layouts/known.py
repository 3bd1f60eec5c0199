"""The published layouts: LLaDA, Dream, SDAR and Fast-dLLM v2, each with the transformers class that has the same layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config

from kdlib.layouts.base import Layout
from kdlib.layouts.llada import LLADA

# Where a mapped configuration keeps the config.json it was made of.
ORIGINAL = "published_config"

# modeling_dream.py of Dream-org/Dream-v0-*: Qwen2's layers, q, k and v always with a bias, is_causal False. Dream-Reasoner
# has the same model_type, and another rule of attention with its block_size.
DREAM = Layout(
    model_type="Dream",
    model="Qwen2ForCausalLM",
    config_class=Qwen2Config,
    required={"use_sliding_window": ((False, None), False), "block_size": ((None,), None)},
    tokenizers={"DreamTokenizer": "Qwen2Tokenizer"},
)

# modeling_sdar.py of JetLM/SDAR-*: made from Qwen3's, layer for layer; its block-causal attention is a mask from outside.
SDAR = Layout(
    model_type="sdar",
    model="Qwen3ForCausalLM",
    config_class=Qwen3Config,
    required={"use_sliding_window": ((False, None), False)},
)

# modeling.py of Efficient-Large-Model/Fast_dLLM_v2_*: Qwen2.5 fine-tuned, its block-causal attention a mask from outside.
FAST_DLLM = Layout(
    model_type="Fast_dLLM_Qwen",
    model="Qwen2ForCausalLM",
    config_class=Qwen2Config,
    required={"use_sliding_window": ((False, None), False)},
)

LAYOUTS: dict[str, Layout] = {layout.model_type: layout for layout in (LLADA, DREAM, SDAR, FAST_DLLM)}


def layout_of(published: Mapping[str, Any]) -> Layout | None:
    """The layout of a config.json; None for one that transformers reads by itself."""
    return LAYOUTS.get(published.get("model_type", ""))


def original_of(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The config.json that a mapped configuration was made of; None for any other configuration."""
    return getattr(config, ORIGINAL, None)  # an attribute of mapped configurations alone

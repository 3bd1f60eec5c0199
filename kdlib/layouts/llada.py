"""LLaDA (GSAI-ML/LLaDA-8B-*, arXiv 2502.09992) as a Llama: names and settings of its modeling_llada.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import LlamaConfig

from kdlib.layouts.base import Layout

_SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "weight_tying": "tie_word_embeddings",
}
_OPTIONS = {
    "n_kv_heads": "num_key_value_heads",
    "attention_dropout": "attention_dropout",
    "init_std": "initializer_range",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "pad_token_id",
}
_PRECISION = {"amp_bf16": "bfloat16", "amp_fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class LLaDALayout(Layout):
    """A config.json with OLMo's keys: d_model, n_heads, embedding_size (rows of the embedding), vocab_size (tokens)."""

    def check(self, published: Mapping[str, Any]) -> None:
        super().check(published)
        if absent := [key for key in (*_SIZES, "vocab_size", "rope_theta") if published.get(key) is None]:
            raise ValueError(f"the config.json of a llada checkpoint needs {', '.join(absent)}")

    def config(self, published: Mapping[str, Any]) -> LlamaConfig:
        given = {ours: published[key] for key, ours in _SIZES.items()} | {"bos_token_id": None}
        given |= {ours: published[key] for key, ours in _OPTIONS.items() if key in published}
        return LlamaConfig(
            **given,
            vocab_size=_rows(published),
            rope_parameters={"rope_type": "default", "rope_theta": published["rope_theta"]},
            dtype=_PRECISION.get(published.get("precision") or ""),
        )

    def published(self, config: Any, *, original: Mapping[str, Any]) -> dict[str, Any]:
        now = {key: getattr(config, ours) for key, ours in (_SIZES | _OPTIONS).items() if key in original}
        now["rope_theta"] = config.rope_parameters["rope_theta"]
        if config.vocab_size != _rows(original):
            now |= {"vocab_size": config.vocab_size, "embedding_size": config.vocab_size}
        return {**original, **now}


def _rows(published: Mapping[str, Any]) -> int:
    return published.get("embedding_size") or published["vocab_size"]


# LLaDALlamaBlock computes ff_out(silu(ff_proj(x)) * up_proj(x)), rotates halves, has no causal mask and, with the settings
# required here, neither a bias nor a scale anywhere. What an absent key stands for is in configuration_llada.py.
LLADA = LLaDALayout(
    model_type="llada",
    model="LlamaForCausalLM",
    config_class=LlamaConfig,
    renames=(
        ("model.transformer.wte.", "model.embed_tokens."),
        ("model.transformer.ln_f.", "model.norm."),
        ("model.transformer.ff_out.", "lm_head."),
        ("model.transformer.blocks.{}.attn_norm.", "model.layers.{}.input_layernorm."),
        ("model.transformer.blocks.{}.ff_norm.", "model.layers.{}.post_attention_layernorm."),
        ("model.transformer.blocks.{}.q_proj.", "model.layers.{}.self_attn.q_proj."),
        ("model.transformer.blocks.{}.k_proj.", "model.layers.{}.self_attn.k_proj."),
        ("model.transformer.blocks.{}.v_proj.", "model.layers.{}.self_attn.v_proj."),
        ("model.transformer.blocks.{}.attn_out.", "model.layers.{}.self_attn.o_proj."),
        ("model.transformer.blocks.{}.ff_proj.", "model.layers.{}.mlp.gate_proj."),
        ("model.transformer.blocks.{}.up_proj.", "model.layers.{}.mlp.up_proj."),
        ("model.transformer.blocks.{}.ff_out.", "model.layers.{}.mlp.down_proj."),
    ),
    required={
        "num_experts": ((None,), None),  # LLaDA-MoE has the same model_type
        "block_type": (("llama",), "sequential"),
        "block_group_size": ((1,), 1),
        "activation_type": (("silu",), "swiglu"),
        "layer_norm_type": (("rms",), "default"),
        "layer_norm_with_affine": ((True,), True),
        "attention_layer_norm": ((False,), False),
        "bias_for_layer_norm": ((False, None), None),
        "include_bias": ((False,), False),
        "include_qkv_bias": ((False, None), False),
        "alibi": ((False,), False),
        "rope": ((True,), False),
        "input_emb_norm": ((False,), False),
        "scale_logits": ((False,), False),
        "multi_query_attention": ((None,), None),
    },
)

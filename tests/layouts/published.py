"""Tiny random checkpoints as LLaDA and Dream are published, and their forward passes written out on the published names."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from tests.tiny import tiny_tokenizer

WORDS = len(tiny_tokenizer())
V = WORDS + 8  # padded, as the published vocabularies are; the mask token is a reserved row
LLADA: dict[str, Any] = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": V,
    "eos_token_id": 2,
    "flash_attention": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": WORDS,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 2,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "transformers_version": "4.46.3",
    "use_cache": False,
    "vocab_size": V,
    "weight_tying": False,
}
DREAM: dict[str, Any] = {
    "architectures": ["DreamModel"],
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "mask_token_id": WORDS,
    "max_position_embeddings": 64,
    "max_window_layers": 28,
    "model_type": "Dream",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "transformers_version": "4.46.2",
    "use_cache": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": V,
}
PUBLISHED = {"llada": LLADA, "Dream": DREAM}


def write(directory: Path, model_type: str, *, shards: int = 1, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A checkpoint with random weights, a tokenizer, and remote code that must not run: it raises when imported."""
    config = {**PUBLISHED[model_type], **changes}
    shapes = llada_shapes(config) if model_type == "llada" else dream_shapes(config)
    generator = torch.Generator().manual_seed(0)
    weights = {name: (0.2 * torch.randn(shape, generator=generator) + ("norm" in name or "ln_f" in name)).to(dtype)
               for name, shape in shapes.items()}  # fmt: skip
    tiny_tokenizer().save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    for part in ("configuration", "modeling"):
        (directory / f"{part}_{model_type.lower()}.py").write_text("raise RuntimeError('remote code was run')\n")
    write_weights(directory, weights, shards=shards)
    return directory


def write_weights(directory: Path, weights: dict[str, Tensor], *, shards: int) -> None:
    if shards == 1:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return
    index: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(weights.items())[i::shards])
        save_file(part, directory / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    size = {"total_size": sum(w.numel() * w.element_size() for w in weights.values())}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": size, "weight_map": index}))


def read(directory: Path) -> dict[str, Tensor]:
    return {name: w for file in sorted(directory.glob("*.safetensors")) for name, w in load_file(file).items()}


def llada_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    D, inner, heads = config["d_model"], config["mlp_hidden_size"], config["n_heads"]
    narrow = D // heads * (config["n_kv_heads"] or heads)
    block = {"q_proj": (D, D), "k_proj": (narrow, D), "v_proj": (narrow, D), "attn_out": (D, D), "ff_proj": (inner, D),
             "up_proj": (inner, D), "ff_out": (D, inner), "attn_norm": (D,), "ff_norm": (D,)}  # fmt: skip
    whole = {"wte": (config["embedding_size"], D), "ln_f": (D,)}
    whole |= {} if config["weight_tying"] else {"ff_out": (config["embedding_size"], D)}
    layers = {f"blocks.{i}.{name}": shape for i in range(config["n_layers"]) for name, shape in block.items()}
    return {f"model.transformer.{name}.weight": shape for name, shape in {**whole, **layers}.items()}


def dream_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    D, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    narrow = D // heads * config["num_key_value_heads"]
    attention = {"q_proj.weight": (D, D), "k_proj.weight": (narrow, D), "v_proj.weight": (narrow, D), "o_proj.weight": (D, D),
                 "q_proj.bias": (D,), "k_proj.bias": (narrow,), "v_proj.bias": (narrow,)}  # fmt: skip
    layer = {f"self_attn.{name}": shape for name, shape in attention.items()}
    layer |= {
        f"mlp.{name}_proj.weight": shape for name, shape in {"gate": (inner, D), "up": (inner, D), "down": (D, inner)}.items()
    }
    layer |= {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
    found = {f"model.layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()}
    return found | {"model.embed_tokens.weight": (config["vocab_size"], D), "model.norm.weight": (D,),
                    "lm_head.weight": (config["vocab_size"], D)}  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def rotated(x: Tensor, theta: float) -> Tensor:
    """x [heads, S, d], its halves as the real and imaginary parts of d/2 numbers, turned by position * theta^(-2i/d)."""
    S, d = x.shape[1:]
    speed = theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    angle = (torch.arange(S, dtype=torch.float64)[:, None] * speed).to(x.dtype)
    a, b = x[..., : d // 2], x[..., d // 2 :]
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), dim=-1)


def attended(q: Tensor, k: Tensor, v: Tensor, *, heads: int, theta: float) -> Tensor:
    """Attention of [S, heads*d] queries to all keys, both ways; a key head serves as many query heads as there are more."""
    S, d = len(q), q.shape[1] // heads
    q, k, v = (x.view(S, -1, d).transpose(0, 1) for x in (q, k, v))
    q, k = rotated(q, theta), rotated(k, theta)
    k, v = (x.repeat_interleave(heads // len(x), dim=0) for x in (k, v))
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(d), dim=-1)
    return (weights @ v).transpose(0, 1).reshape(S, heads * d)


def llada_logits(weights: dict[str, Tensor], config: dict[str, Any], ids: Tensor) -> Tensor:
    """LLaDAModel.forward of modeling_llada.py for one row of ids [S]: logits [S, V] in float32."""
    w = {name.removeprefix("model.transformer.").removesuffix(".weight"): x.float() for name, x in weights.items()}
    x, eps = w["wte"][ids], config["rms_norm_eps"]
    for i in range(config["n_layers"]):
        b = {name.removeprefix(f"blocks.{i}."): p for name, p in w.items() if name.startswith("blocks")}
        h = rms_norm(x, b["attn_norm"], eps)
        q, k, v = (h @ b[name].T for name in ("q_proj", "k_proj", "v_proj"))
        x = x + attended(q, k, v, heads=config["n_heads"], theta=config["rope_theta"]) @ b["attn_out"].T
        h = rms_norm(x, b["ff_norm"], eps)
        x = x + (F.silu(h @ b["ff_proj"].T) * (h @ b["up_proj"].T)) @ b["ff_out"].T
    return rms_norm(x, w["ln_f"], eps) @ (w["wte"] if config["weight_tying"] else w["ff_out"]).T


def dream_logits(weights: dict[str, Tensor], config: dict[str, Any], ids: Tensor) -> Tensor:
    """DreamModel.forward of modeling_dream.py for one row of ids [S]: logits [S, V] in float32, not shifted."""
    w = {name: x.float() for name, x in weights.items()}
    x, eps, heads = w["model.embed_tokens.weight"][ids], config["rms_norm_eps"], config["num_attention_heads"]
    for i in range(config["num_hidden_layers"]):
        p = {name.removeprefix(f"model.layers.{i}."): value for name, value in w.items()}
        h = rms_norm(x, p["input_layernorm.weight"], eps)
        q, k, v = (h @ p[f"self_attn.{n}_proj.weight"].T + p[f"self_attn.{n}_proj.bias"] for n in "qkv")
        x = x + attended(q, k, v, heads=heads, theta=config["rope_theta"]) @ p["self_attn.o_proj.weight"].T
        h = rms_norm(x, p["post_attention_layernorm.weight"], eps)
        gate, up = h @ p["mlp.gate_proj.weight"].T, h @ p["mlp.up_proj.weight"].T
        x = x + (F.silu(gate) * up) @ p["mlp.down_proj.weight"].T
    return rms_norm(x, w["model.norm.weight"], eps) @ w["lm_head.weight"].T


LOGITS = {"llada": llada_logits, "Dream": dream_logits}

"""Models cut out of others: the same function where nothing is cut, and the chosen layers where something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from kdlib.drafts.prune import pruned
from tests.tiny import tiny_llama

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2 = {name: value for name, value in SIZES.items() if name != "head_dim"}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen2_sliding": Qwen2Config(**QWEN2, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "qwen3_tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, sliding_window=4),
    "gemma2_alternating": Gemma2Config(**SIZES, sliding_window=4, query_pre_attn_scalar=8),
    "smollm3_without_rope": SmolLM3Config(**SIZES, no_rope_layer_interval=2),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name])
    return model.eval()


def prompts() -> Tensor:
    return torch.randint(3, 96, (2, 11), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_with_all_layers_the_logits_are_the_targets(name: str) -> None:
    target, ids = model_of(name), prompts()
    copied = pruned(target, range(4))
    assert type(copied) is type(target)
    with torch.no_grad():
        assert torch.equal(copied(input_ids=ids).logits, target(input_ids=ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_logits_are_those_of_the_target_whose_other_layers_do_nothing(name: str) -> None:
    target, ids, layers = model_of(name), prompts(), [1, 2]
    draft = pruned(target, layers)
    for number in set(range(4)) - set(layers):
        _silence(target.get_decoder().layers[number])
    with torch.no_grad():
        torch.testing.assert_close(draft(input_ids=ids).logits, target(input_ids=ids).logits)
    assert draft.config.num_hidden_layers == 2 and len(draft.get_decoder().layers) == 2


def _silence(layer: torch.nn.Module) -> None:
    """Takes from a residual block what it adds: its two output projections, and the norms after them that Gemma has."""
    for name, parameter in layer.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            parameter.data.zero_()


@pytest.mark.parametrize("name", CONFIGS)
def test_it_generates_with_a_cache_as_without(name: str) -> None:
    draft, ids = pruned(model_of(name), [0, 3]), prompts()
    settings: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with_cache = draft.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)
    without = draft.generate(ids, attention_mask=torch.ones_like(ids), use_cache=False, **settings)
    assert torch.equal(with_cache, without)


def test_it_is_saved_and_loaded_as_what_it_is(tmp_path: Any) -> None:
    draft, ids = pruned(model_of("gemma2_alternating"), [1, 3]), prompts()
    draft.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.layer_types == ["full_attention", "full_attention"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, draft(input_ids=ids).logits)


def test_the_target_is_left_alone_and_shares_nothing() -> None:
    target, ids = tiny_llama(96, layers=3).to(torch.bfloat16).train(), prompts()
    target.generation_config.temperature = 0.7
    before, rng = target(input_ids=ids).logits, torch.get_rng_state()
    draft = pruned(target, [2])
    assert torch.equal(torch.get_rng_state(), rng)
    assert draft.dtype == torch.bfloat16 and draft.training and draft.generation_config.temperature == 0.7
    for parameter in draft.parameters():
        parameter.data.zero_()
    assert torch.equal(target(input_ids=ids).logits, before) and target.config.num_hidden_layers == 3


@pytest.mark.parametrize("layers", [[], [0, 0], [1, 0], [0, 3], [-1]])
def test_layers_that_make_no_model_are_refused(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="ascending numbers from 0 to 2"):
        pruned(tiny_llama(96, layers=3), layers)


def test_models_whose_layers_differ_by_their_number_are_refused() -> None:
    experts: dict[str, int] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SIZES, **experts, mlp_only_layers=[0]))
    assert len(pruned(model, [0, 2]).get_decoder().layers) == 2
    with pytest.raises(ValueError, match="its layers differ by their number"):
        pruned(model, [1, 2])

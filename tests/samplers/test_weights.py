"""Merged weights against what transformers and peft themselves would save."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from kdlib.samplers import merged_weights, untie
from tests.tiny import tiny_llama

V = 96


def saved(model: Any, directory: Path) -> dict[str, Tensor]:
    """What ``save_pretrained`` writes."""
    model.save_pretrained(directory)
    return load_file(directory / "model.safetensors")


def adapted(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(V), LoraConfig(r=4, lora_alpha=16, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mixtral() -> nn.Module:
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_local_experts": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize(
    "model",
    [tiny_llama(V), tiny_llama(V, tie_word_embeddings=True), tiny_llama(V, attention_bias=True), mixtral()],
    ids=["llama", "tied", "biases", "mixture of experts"],
)
def test_plain_models_are_as_saved(model: nn.Module, tmp_path: Path) -> None:
    assert_same(dict(merged_weights(model)), saved(model, tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
        {"target_modules": ["k_proj", "lm_head", "embed_tokens"]},
        {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "norm"]},
    ],
    ids=["lora", "rslora, all linear", "dora", "embeddings", "modules to save"],
)
def test_adapters_are_merged_as_peft_merges_them(config: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(**config)
    expected = saved(copy.deepcopy(model).merge_and_unload(), tmp_path)
    before = copy.deepcopy(model.state_dict())
    assert_same(dict(merged_weights(model)), expected)
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()  # still trained through the adapter
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_an_adapter_that_is_off_is_left_out(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with model.disable_adapter():
        assert_same(dict(merged_weights(model)), saved(tiny_llama(V), tmp_path))


def test_an_adapter_on_tied_embeddings_is_refused() -> None:
    model = get_peft_model(tiny_llama(V, tie_word_embeddings=True), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="tied"):
        list(merged_weights(model))


def test_single_trained_tokens_are_refused() -> None:
    model = get_peft_model(tiny_llama(V), LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]))
    with pytest.raises(ValueError, match=r"model\.embed_tokens: single trained tokens"):
        list(merged_weights(model))


def test_untied_models_are_the_same_until_they_are_trained(tmp_path: Path) -> None:
    tied, model = tiny_llama(V, tie_word_embeddings=True), tiny_llama(V, tie_word_embeddings=True)
    untie(model)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(model(input_ids=ids).logits, tied(input_ids=ids).logits)
    assert "lm_head.weight" in dict(merged_weights(model)) and "lm_head.weight" not in dict(merged_weights(tied))
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(model(input_ids=ids).logits, 2 * tied(input_ids=ids).logits)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)

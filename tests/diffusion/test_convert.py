"""An auto-regressive model becomes a diffusion model: attention, the mask token's row, and models that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from kdlib.diffusion import DiffusionSpec, as_diffusion, check_diffusion, spec_of, with_mask_token
from kdlib.models import inner
from tests.tiny import tiny_llama, tiny_tokenizer

V = len(tiny_tokenizer())
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def spec(mask_token_id: int = V) -> DiffusionSpec:
    return DiffusionSpec(mask_token_id=mask_token_id)


def rows(model: nn.Module) -> tuple[int, int]:
    base: Any = inner(model)
    return base.get_input_embeddings().weight.shape[0], base.get_output_embeddings().weight.shape[0]


def test_the_mask_token_of_a_tokenizer() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(ValueError, match="has no mask token: add one with --mask_token"):
        with_mask_token(tokenizer, None)
    assert with_mask_token(tokenizer, "<|mask|>") == V == with_mask_token(tokenizer, None)
    assert tokenizer.decode([V], skip_special_tokens=True) == ""
    assert with_mask_token(tokenizer, "<|system|>") == tokenizer.convert_tokens_to_ids("<|system|>"), "one that is there"
    assert len(tokenizer) == V + 1


@pytest.mark.parametrize("tied", [False, True])
def test_it_reads_both_ways_and_stays_so(tmp_path: Path, tied: bool) -> None:
    model = tiny_llama(V, tie_word_embeddings=tied)
    before = model.get_input_embeddings().weight.clone()
    with pytest.raises(ValueError, match="is causal, its tokens do not see later ones"):
        check_diffusion(model, spec(0))
    assert as_diffusion(model, spec()) is model
    check_diffusion(model, spec())
    assert rows(model) == (V + 1, V + 1) and model.config.vocab_size == V + 1
    weight = model.get_input_embeddings().weight
    assert torch.equal(weight[:V], before)
    torch.testing.assert_close(weight[V], before.mean(0))
    assert (model.get_output_embeddings().weight is weight) == tied
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    check_diffusion(again, spec_of(again.config))
    assert spec_of(AutoConfig.from_pretrained(tmp_path)) == spec()


def test_a_row_that_is_there_is_taken() -> None:
    model = tiny_llama(V + 8)
    before = {name: p.clone() for name, p in model.named_parameters()}
    as_diffusion(model, spec(V + 3))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_decoding_settings_stay() -> None:
    model = tiny_llama(V)
    model.config.diffusion = {**spec(3).to_json(), "decoding": {"gen_length": 64}}
    as_diffusion(model, spec(4))
    assert model.config.diffusion == {**spec(4).to_json(), "decoding": {"gen_length": 64}}


def test_a_mask_token_of_another_tokenizer_is_refused() -> None:
    with pytest.raises(ValueError, match=f"mask_token_id 126336 is far outside of the model's {V} embeddings"):
        as_diffusion(tiny_llama(V), spec(126336))
    with pytest.raises(ValueError, match=f"mask_token_id {V} is outside of the student's {V} embeddings"):
        check_diffusion(tiny_llama(V), spec(), role="student")
    with pytest.raises(ValueError, match="has no mask token"):
        check_diffusion(tiny_llama(V), DiffusionSpec(mask_token_id=None, attention="canvas", block_length=8))


def test_below_an_adapter() -> None:
    adapted = get_peft_model(tiny_llama(V), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    as_diffusion(adapted, spec())
    check_diffusion(adapted, spec())
    assert rows(adapted) == (V + 1, V + 1)
    assert rows(adapted.merge_and_unload()) == (V + 1, V + 1)


@pytest.mark.parametrize(
    "held", [{"target_modules": ["embed_tokens"]}, {"modules_to_save": ["lm_head"]}], ids=["lora", "saved"]
)
def test_an_adapter_that_holds_the_embeddings_is_in_the_way(held: dict[str, Any]) -> None:
    adapted = get_peft_model(tiny_llama(V), LoraConfig(r=2, task_type="CAUSAL_LM", **{"target_modules": ["q_proj"], **held}))
    as_diffusion(adapted, spec(3))
    with pytest.raises(ValueError, match="needs a new row of the embeddings, which an adapter holds"):
        as_diffusion(adapted, spec())


def flash() -> nn.Module:
    model = tiny_llama(64)
    model.config._attn_implementation = "flash_attention_2"
    return model


REFUSED = {
    "encoder": (lambda: BertForMaskedLM(BertConfig(**SIZES)), "is an encoder"),
    "recurrent": (
        lambda: MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1)),
        "recurrent or linear",
    ),
    "linear": (
        lambda: Qwen3NextForCausalLM(
            Qwen3NextConfig(**SIZES, num_experts=0, layer_types=["linear_attention", "full_attention"])
        ),
        "recurrent or linear",
    ),
    "window": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)), "sliding-window"),
    "some-windows": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES)), "sliding-window"),
    "flash": (flash, "give attn_implementation sdpa"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_models_that_cannot_be_diffusion_models(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message) as error:
        check_diffusion(as_diffusion(make(), spec(3)), spec(3))
    assert "\n" not in str(error.value)

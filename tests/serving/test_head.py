"""The head read from a checkpoint against the whole model's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    PhiConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from kdlib.serving.head import checkpoint_head
from tests.tiny import tiny_llama

_SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_MODELS = {
    "untied": lambda: tiny_llama(100),
    "tied": lambda: tiny_llama(100, tie_word_embeddings=True),
    "softcap": lambda: made(Gemma2Config(**_SIZES, final_logit_softcapping=3.0)),
    "scale": lambda: made(CohereConfig(**_SIZES, logit_scale=0.3)),
    "divisor": lambda: made(GraniteConfig(**_SIZES, logits_scaling=4.0)),
    "bias": lambda: made(PhiConfig(**{key: value for key, value in _SIZES.items() if key != "head_dim"})),
    "experts": lambda: made(Qwen3MoeConfig(**_SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)),
    "gpt2": lambda: made(GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4)),
}


def made(config: object) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.get_output_embeddings().parameters():
        parameter.data.normal_()  # biases start at 0, where a lost one would not be noticed
    return model


def backbone(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0]


@torch.no_grad()
@pytest.mark.parametrize("name", list(_MODELS))
def test_gives_the_model_s_logits(name: str, tmp_path: Path) -> None:
    model, ids = _MODELS[name](), torch.arange(6)[None]
    model.save_pretrained(tmp_path)
    head = checkpoint_head(str(tmp_path), AutoConfig.from_pretrained(tmp_path), dtype=torch.float32)
    expected = model(input_ids=ids, use_cache=False).logits[0]
    torch.testing.assert_close(head(backbone(model, ids)), expected, rtol=1e-5, atol=1e-5)


def test_reads_one_file_of_many(tmp_path: Path) -> None:
    model = tiny_llama(100)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    head = checkpoint_head(str(tmp_path), model.config, dtype=torch.bfloat16)
    assert head.weight.dtype == torch.bfloat16 and head.weight.equal(model.lm_head.weight.to(torch.bfloat16))


def test_a_checkpoint_without_safetensors_is_named(tmp_path: Path) -> None:
    model = tiny_llama(100)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no safetensors"):
        checkpoint_head(str(tmp_path), model.config, dtype=torch.float32)


def test_logits_that_the_head_does_not_know_are_noticed(tmp_path: Path) -> None:
    made(GraniteConfig(**_SIZES, logits_scaling=4.0)).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    plain = checkpoint_head(str(tmp_path), config, dtype=torch.float32)
    assert plain.scale == 0.25
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdlib.head._logit_transform", lambda config: (1.0, None))
        with pytest.raises(ValueError, match="does more to its logits"):
            checkpoint_head(str(tmp_path), config, dtype=torch.float32)

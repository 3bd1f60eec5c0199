"""``Head.of`` on real models: the last hidden state through it gives the model's own logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    Cohere2Config,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.models.auto import AutoModelForCausalLM

from kdlib.head import Head, accumulation_dtype, wide_matmul
from kdlib.kernels import linear_objective
from kdlib.objectives import CrossEntropy
from kdlib.types import Positions, StudentSignal
from tests.tiny import tiny_llama

V = 40
SHAPE = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma2_softcap": Gemma2Config(**SHAPE, final_logit_softcapping=2.0),
    "cohere_logit_scale": CohereConfig(**SHAPE, logit_scale=0.25),
    "cohere2_logit_scale": Cohere2Config(**SHAPE, logit_scale=0.5),
    "granite_logits_scaling": GraniteConfig(**SHAPE, logits_scaling=4.0),
    "phi_bias": PhiConfig(**{k: v for k, v in SHAPE.items() if k != "head_dim"}),
    "gpt2_tied": GPT2Config(vocab_size=V, n_embd=16, n_layer=1, n_head=2, initializer_range=0.3),
    "falcon_h1_multiplier": FalconH1Config(
        **SHAPE, lm_head_multiplier=0.3, mamba_d_ssm=16, mamba_n_heads=2, mamba_d_head=8, mamba_d_state=4
    ),
}
IDS = torch.arange(3, 15).view(2, 6)


def made(config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model


def last_hidden(model: nn.Module) -> Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base.get_decoder()(input_ids=IDS, use_cache=False).last_hidden_state


def assert_gives_the_logits(model: nn.Module) -> Head:
    head = Head.of(model)
    with torch.no_grad():
        wanted = model(input_ids=IDS, use_cache=False).logits
        torch.testing.assert_close(head(last_hidden(model).flatten(0, 1)), wanted.flatten(0, 1), rtol=1e-5, atol=1e-5)
    return head


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_head_of_hidden_states_is_the_models_logits(config: PretrainedConfig) -> None:
    head = assert_gives_the_logits(made(config))
    assert head.out_features == V
    assert (head.bias is not None) == (config.model_type == "phi")


def test_what_each_family_does_to_its_logits() -> None:
    found = {name: (h.scale, h.softcap) for name, h in ((n, Head.of(made(c))) for n, c in CONFIGS.items())}
    assert found["llama"] == (1.0, None)
    assert found["gemma2_softcap"] == (1.0, 2.0)
    assert found["cohere_logit_scale"] == (0.25, None)
    assert found["granite_logits_scaling"] == (0.25, None)
    assert found["falcon_h1_multiplier"] == (0.3, None)


def test_a_tied_heads_gradient_arrives_at_the_embedding() -> None:
    model = made(CONFIGS["llama_tied"])
    assert Head.of(model).weight is model.get_input_embeddings().weight


def test_the_first_entries_of_a_padded_vocabulary() -> None:
    model = tiny_llama(V)
    head = Head.of(model, vocab_size=33)
    assert head.out_features == 33
    hidden = last_hidden(model).flatten(0, 1)
    torch.testing.assert_close(head(hidden), Head.of(model)(hidden)[:, :33])
    assert Head.of(model, vocab_size=V + 5).out_features == V


# Adapters -------------------------------------------------------------------------------------------


def adapted(config: PretrainedConfig, **options: Any) -> PeftModel:
    """A model with a random (not zero) adapter."""
    settings = {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["lm_head", "q_proj"],
        "lora_dropout": 0.0,
        **options,
    }
    model = get_peft_model(made(config), LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("family", ["llama", "gemma2_softcap", "cohere_logit_scale", "phi_bias"])
@pytest.mark.parametrize("rslora", [False, True])
def test_lora_on_the_head(family: str, rslora: bool) -> None:
    head = assert_gives_the_logits(adapted(CONFIGS[family], use_rslora=rslora))
    assert head.lora is not None and head.lora[2] == pytest.approx(5 / 3**0.5 if rslora else 5 / 3)


def test_lora_gradients_are_pefts_own() -> None:
    model = adapted(CONFIGS["llama"])
    labels = (IDS + 1).flatten()
    wanted = model(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    torch.nn.functional.cross_entropy(wanted, labels, reduction="sum").backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in named} == {"lora_A", "lora_B"}
    theirs = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
    model.zero_grad()
    student = StudentSignal(
        hidden=last_hidden(model).flatten(0, 1),
        head=Head.of(model),
        positions=Positions(index=torch.arange(len(labels)), labels=labels, sequence=torch.zeros_like(labels)),
    )
    linear_objective(student, None, CrossEntropy(), impl="chunked").sum.backward()
    assert theirs.keys() == named.keys()
    for name, parameter in named.items():  # of the head's pair, and behind it of q_proj's
        torch.testing.assert_close(parameter.grad, theirs[name], rtol=1e-4, atol=1e-5, msg=name)


def test_lora_elsewhere_leaves_a_plain_head() -> None:
    assert assert_gives_the_logits(adapted(CONFIGS["llama"], target_modules=["q_proj"])).lora is None


def test_a_disabled_adapter_is_left_out() -> None:
    model = adapted(CONFIGS["llama"])
    with model.disable_adapter():
        assert assert_gives_the_logits(model).lora is None
    assert assert_gives_the_logits(model).lora is not None


def test_a_merged_adapter_is_in_the_weight() -> None:
    model = adapted(CONFIGS["llama"])
    model.merge_adapter()
    assert assert_gives_the_logits(model).lora is None


def test_a_head_among_modules_to_save_is_the_copy_that_is_trained() -> None:
    model = adapted(CONFIGS["llama"], target_modules=["q_proj"], modules_to_save=["lm_head"])
    head = assert_gives_the_logits(model)
    assert head.weight.requires_grad
    with torch.no_grad():
        head.weight.add_(1.0)
    changed = assert_gives_the_logits(model)
    with model.disable_adapter():
        original = assert_gives_the_logits(model)
    assert original.weight is not changed.weight and not original.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "set lora_dropout to 0"),
        ({"use_dora": True}, "drop DoRA"),
        ({"lora_bias": True}, "set lora_bias to false"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_adapters_that_the_form_cannot_express_are_refused(options: dict[str, Any], message: str) -> None:
    model = adapted(CONFIGS["phi_bias" if "lora_bias" in options else "llama"], **options)
    with pytest.raises(ValueError, match=message):
        Head.of(model)


def test_two_active_adapters_on_the_head_are_refused() -> None:
    model = adapted(CONFIGS["llama"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="the second adapter"):
        Head.of(model)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel has no output embeddings"):
        Head.of(tiny_llama(V).get_decoder())


# Products -------------------------------------------------------------------------------------------


def test_products_of_16_bit_tensors_come_out_wide() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(8, 32, generator=generator).bfloat16(),
        torch.randn(32, 5, generator=generator).bfloat16(),
    )
    exact = a.double() @ b.double()
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = wide_matmul(a, b)
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < 1e-5
    out = torch.empty(8, 5)
    assert wide_matmul(a, b, out=out).data_ptr() == out.data_ptr()


def test_float64_stays_float64() -> None:
    assert accumulation_dtype(torch.zeros(1), torch.zeros(1).double()) == torch.float64
    assert accumulation_dtype(torch.zeros(1).half(), torch.zeros(1).bfloat16()) == torch.float32
    head = Head(weight=torch.zeros(4, 3), bias=torch.zeros(4))
    assert head(torch.zeros(2, 3).double()).dtype == torch.float64

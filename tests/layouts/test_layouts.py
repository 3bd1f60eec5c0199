"""Published layouts in transformers classes: the logits of the published forward pass, and no remote code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, Qwen2ForCausalLM, Qwen2Tokenizer, Qwen3ForCausalLM

from kdlib import layouts
from kdlib.models import load_config, load_model, load_tokenizer
from tests.layouts.published import LLADA, LOGITS, PUBLISHED, WORDS, V, read, write
from tests.tiny import tiny_llama, tiny_tokenizer

IDS = torch.randint(0, V, (2, 9), generator=torch.Generator().manual_seed(1))
CLASSES = {"llada": LlamaForCausalLM, "Dream": Qwen2ForCausalLM}
LLADAS: list[dict[str, Any]] = [{}, {"weight_tying": True}, {"n_kv_heads": 2}, {"n_kv_heads": None, "rope_theta": 1e4}]


def expected(directory: Path, model_type: str, **changes: Any) -> Tensor:
    config = {**PUBLISHED[model_type], **changes}
    return torch.stack([LOGITS[model_type](read(directory), config, ids) for ids in IDS])


@torch.no_grad()
def check_logits(model: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(model(input_ids=IDS).logits, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", LLADAS, ids=["plain", "tied", "grouped", "absent-kv-heads"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_llada_computes_as_published(tmp_path: Path, changes: dict[str, Any], attention: str) -> None:
    write(tmp_path, "llada", **changes)
    model = load_model(str(tmp_path), dtype="float32", attn_implementation=attention)
    assert type(model) is LlamaForCausalLM and model.config.is_causal is False
    assert model.config._attn_implementation == attention
    check_logits(model, expected(tmp_path, "llada", **changes))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_dream_computes_as_published(tmp_path: Path, kv_heads: int) -> None:
    write(tmp_path, "Dream", num_key_value_heads=kv_heads)
    model = load_model(str(tmp_path))
    assert type(model) is Qwen2ForCausalLM and model.config.is_causal is False
    check_logits(model, expected(tmp_path, "Dream", num_key_value_heads=kv_heads))


def test_gate_and_up_projection_are_not_exchanged(tmp_path: Path) -> None:
    weights, model = read(write(tmp_path, "llada")), load_model(str(tmp_path), dtype="float32")
    mlp = model.model.layers[1].mlp
    assert torch.equal(mlp.gate_proj.weight, weights["model.transformer.blocks.1.ff_proj.weight"])
    assert torch.equal(mlp.up_proj.weight, weights["model.transformer.blocks.1.up_proj.weight"])


@pytest.mark.parametrize("model_type", ["llada", "Dream"])
def test_shards_and_dtypes(tmp_path: Path, model_type: str) -> None:
    write(
        tmp_path, model_type, shards=3, dtype=torch.bfloat16, **({"torch_dtype": "bfloat16"} if model_type == "Dream" else {})
    )
    assert {p.dtype for p in load_model(str(tmp_path)).parameters()} == {torch.bfloat16}, "as it was published"
    model = load_model(str(tmp_path), dtype=torch.float32, device_map="cpu")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    check_logits(model, expected(tmp_path, model_type))
    assert load_config(str(tmp_path)).dtype == torch.bfloat16


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("model_type", ["llada", "Dream"])
def test_no_remote_code_is_run(tmp_path: Path, model_type: str, trusted: bool) -> None:
    """The checkpoint's own files raise when they are imported; the mapping is preferred where they are trusted too."""
    write(tmp_path, model_type)
    assert type(load_model(str(tmp_path), trust_remote_code=trusted)) is CLASSES[model_type]
    assert type(load_config(str(tmp_path), trust_remote_code=trusted)) is CLASSES[model_type].config_class
    assert load_tokenizer(str(tmp_path)).get_vocab() == tiny_tokenizer().get_vocab()


def test_the_tokenizer_of_dream_is_qwens(tmp_path: Path) -> None:
    """Published with vocab.json, merges.txt and a class of its own."""
    write(tmp_path, "Dream")
    made = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(made["vocab"]))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in made["merges"]))
    (tmp_path / "tokenization_dream.py").write_text("raise RuntimeError('remote code was run')\n")
    special = {
        "content": "<|mask|>",
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }
    settings = {
        "added_tokens_decoder": {str(WORDS): special},
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "mask_token": "<|mask|>",
        "pad_token": "<|pad|>",
        "tokenizer_class": "DreamTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(str(tmp_path))
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert (tokenizer.mask_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id) == (WORDS, 0, 2)
    assert tokenizer.decode(tokenizer("two plus two")["input_ids"]) == "two plus two"
    tokenizer.save_pretrained(tmp_path / "again")
    again = load_tokenizer(str(tmp_path / "again"))
    assert again("The sky is blue<|mask|>")["input_ids"] == tokenizer("The sky is blue<|mask|>")["input_ids"]


VARIANTS: list[tuple[str, dict[str, Any], str]] = [
    ("llada", {"alibi": True}, "alibi True"),
    ("llada", {"layer_norm_type": "default"}, "layer_norm_type 'default'"),
    ("llada", {"block_group_size": 2}, "block_group_size 2"),
    ("llada", {"include_bias": True}, "include_bias True"),
    ("llada", {"activation_type": "swiglu"}, "activation_type 'swiglu'"),
    ("llada", {"num_experts": 64}, "num_experts 64"),
    ("llada", {"mlp_hidden_size": None}, "needs mlp_hidden_size"),
    ("Dream", {"block_size": 32}, "block_size 32"),
]


@pytest.mark.parametrize(("model_type", "changes", "message"), VARIANTS, ids=[message for _, _, message in VARIANTS])
def test_other_variants_are_refused_in_one_line(tmp_path: Path, model_type: str, changes: dict[str, Any], message: str) -> None:
    directory = tmp_path / "variant"
    write(directory, model_type)
    (directory / "config.json").write_text(json.dumps({**PUBLISHED[model_type], **changes}))
    with pytest.raises(ValueError, match=message) as error:
        load_model(str(directory))
    assert "\n" not in str(error.value)


def test_a_variant_runs_its_own_code_where_that_is_trusted(tmp_path: Path) -> None:
    write(tmp_path, "llada")
    (tmp_path / "config.json").write_text(json.dumps({**LLADA, "alibi": True}))
    with pytest.raises(RuntimeError, match="remote code was run"):
        load_model(str(tmp_path), trust_remote_code=True)


def test_an_absent_key_means_what_the_published_code_takes(tmp_path: Path) -> None:
    write(tmp_path, "llada")
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in LLADA.items() if key != "rope"}))
    with pytest.raises(ValueError, match="rope False"):
        load_model(str(tmp_path))


def test_missing_and_unknown_parameters_are_named(tmp_path: Path) -> None:
    write(tmp_path, "llada")
    (tmp_path / "config.json").write_text(json.dumps({**LLADA, "n_layers": 3}))
    with pytest.raises(ValueError, match=r"no llada checkpoint as published: .*layers\.2"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**LLADA, "n_layers": 1}))
    with pytest.raises(ValueError, match=r"no llada checkpoint as published: .*1"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("model_type", "made", "config"),
    [("sdar", Qwen3ForCausalLM, {"block_size": 4, "head_dim": 8}), ("Fast_dLLM_Qwen", Qwen2ForCausalLM, {"bd_size": 32})],
    ids=["sdar", "fast-dllm"],
)
def test_block_diffusion_models_with_the_names_of_qwen(
    tmp_path: Path, model_type: str, made: Any, config: dict[str, Any]
) -> None:
    sizes = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2}
    source = made(made.config_class(**sizes, is_causal=False, **config)).eval()
    source.save_pretrained(tmp_path)
    said = {**sizes, **config, "model_type": model_type, "rope_theta": 10000.0, "auto_map": {"AutoConfig": "remote.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    model = load_model(str(tmp_path))
    assert type(model) is made and model.config.is_causal is False
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, source(input_ids=IDS).logits)


def test_an_adapter_of_a_published_checkpoint_is_loaded_on_it(tmp_path: Path) -> None:
    base = write(tmp_path / "base", "llada")
    adapted = get_peft_model(
        load_model(str(base), dtype="float32"),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        wanted = adapted.eval()(input_ids=IDS).logits
    assert (wanted - expected(base, "llada")).abs().max() > 1e-3
    check_logits(load_model(str(tmp_path / "adapter"), dtype="float32"), wanted)


def test_other_checkpoints_are_left_to_transformers(tmp_path: Path) -> None:
    tiny_llama(V).save_pretrained(tmp_path)
    assert layouts.read_config(str(tmp_path)) is None
    model = load_model(str(tmp_path))
    assert type(model) is LlamaForCausalLM and not layouts.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="the directory does not exist"):
        load_model(str(tmp_path / "nowhere"))


def test_code_on_the_hub_is_named_by_its_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is saved of a model from the Hub has none of its .py files."""
    cached = tmp_path / "models--org--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    write(cached / "snapshots" / ("0" * 40), "Dream")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    config = layouts.read_config("org/model")
    assert config is not None
    assert config.published_config["auto_map"]["AutoModel"] == "org/model--modeling_dream.DreamModel"

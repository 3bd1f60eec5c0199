"""Heads to disk and back, bit by bit, in both formats, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.drafts.eagle3_config import Eagle3Config
from kdlib.drafts.formats import is_head, load, serve_command, write
from kdlib.drafts.vocabulary import draft_vocabulary
from kdlib.head import Head
from tests.tiny import tiny_llama

V, DV = 96, 40
TARGET = tiny_llama(V, layers=4)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def head(dtype: torch.dtype = torch.float32, draft_vocab_size: int = DV, **config: Any) -> Eagle3Draft:
    torch.manual_seed(3)
    settings = Eagle3Config.of_target(TARGET.config, draft_vocab_size=draft_vocab_size, **config)
    counts = torch.randint(0, 9, (V,))
    vocabulary = draft_vocabulary(counts, draft_vocab_size, vocab_size=V)
    embeddings = TARGET.get_input_embeddings().weight
    return Eagle3Draft.for_target(settings, embeddings=embeddings, head=Head.of(TARGET), vocabulary=vocabulary).to(dtype)


def written(directory: Path, draft: Eagle3Draft, kind: str) -> Path:
    return write(draft, directory, format=kind, target_name="org/target", num_speculative_tokens=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["eagle", "speculators"])
@pytest.mark.parametrize(
    ("dtype", "config"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {"norm_before_residual": True, "rope_parameters": LLAMA3_ROPE}),
        (torch.float32, {"norm_before_fc": True, "norm_output": True, "draft_vocab_size": V}),
        (torch.float32, {"fc_norm": True, "hidden_size": 16, "head_dim": 4, "own_embeddings": True}),
    ],
)
def test_a_round_trip_is_exact(tmp_path: Path, kind: str, dtype: torch.dtype, config: dict[str, Any]) -> None:
    if "hidden_size" in config:
        draft = Eagle3Draft(Eagle3Config.of_target(TARGET.config, draft_vocab_size=DV, **config))
    else:
        draft = head(dtype, **config)
    again = load(written(tmp_path, draft, kind), TARGET.to(torch.float32))
    assert is_head(tmp_path) and not again.training
    assert draft.state_dict().keys() == again.state_dict().keys()
    for name, tensor in draft.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype and torch.equal(again.state_dict()[name], tensor), name
    ours, theirs = draft.config.to_dict(), again.config.to_dict()
    for known in ("dtype", "architectures"):
        ours.pop(known), theirs.pop(known)
    assert ours == theirs
    written(tmp_path / "again", again, kind)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_eagle_files_are_those_that_vllm_and_specforge_read(tmp_path: Path) -> None:
    written(tmp_path, head(), "eagle")
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["LlamaForCausalLMEagle3"]
    assert content["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert content["norm_before_residual"] is False and content["draft_vocab_size"] == DV and content["vocab_size"] == V
    weights = load_file(tmp_path / "model.safetensors")
    shapes = {
        "fc.weight": [32, 96],
        "midlayer.self_attn.q_proj.weight": [32, 64],
        "midlayer.self_attn.k_proj.weight": [16, 64],
        "midlayer.self_attn.v_proj.weight": [16, 64],
        "midlayer.self_attn.o_proj.weight": [32, 32],
        "midlayer.mlp.gate_proj.weight": [64, 32],
        "midlayer.mlp.up_proj.weight": [64, 32],
        "midlayer.mlp.down_proj.weight": [32, 64],
        "midlayer.hidden_norm.weight": [32],
        "midlayer.input_layernorm.weight": [32],
        "midlayer.post_attention_layernorm.weight": [32],
        "norm.weight": [32],
        "lm_head.weight": [DV, 32],
        "d2t": [DV],
        "t2d": [V],
    }
    assert {name: list(x.shape) for name, x in weights.items()} == shapes
    assert weights["d2t"].dtype == torch.int64 and weights["t2d"].dtype == torch.bool
    assert bool(weights["t2d"][torch.arange(DV) + weights["d2t"]].all()) and int(weights["t2d"].sum()) == DV
    known = LlamaConfig(**{k: v for k, v in content.items() if k != "architectures"})  # as transformers, thus vLLM, reads it
    assert known.rope_parameters == TARGET.config.rope_parameters


def test_speculators_files_name_the_target(tmp_path: Path) -> None:
    written(tmp_path, head(), "speculators")
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["speculators_model_type"] == "eagle3"
    assert content["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert content["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 3
    assert content["norm_before_residual"] is False and content["transformer_layer_config"]["model_type"] == "llama"
    assert "layers.0.self_attn.q_proj.weight" in load_file(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="give both"):
        write(head(), tmp_path, format="speculators", target_name="org/target")


def test_what_to_type() -> None:
    given = {"target_name": "org/target", "num_speculative_tokens": 3}
    assert serve_command("out dir", format="speculators", **given) == "vllm serve 'out dir'"  # type: ignore[arg-type]
    line = serve_command("out", format="eagle", **given)  # type: ignore[arg-type]
    assert line.startswith('vllm serve org/target --speculative-config \'{"method": "eagle3"')


def test_a_head_without_a_target_or_layers(tmp_path: Path) -> None:
    written(tmp_path, head(), "eagle")
    assert load(tmp_path).config.own_embeddings is False
    content = json.loads((tmp_path / "config.json").read_text())
    ids = content.pop("eagle_aux_hidden_state_layer_ids")
    (tmp_path / "config.json").write_text(json.dumps({**content, "eagle_config": {"eagle_aux_hidden_state_layer_ids": ids}}))
    assert load(tmp_path).config.feature_layers == ids
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load(tmp_path, TARGET).config.feature_layers == [1, 2, 3]
    with pytest.raises(ValueError, match="which layers"):
        write(load(tmp_path), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**content, "eagle_aux_hidden_state_layer_ids": [2, 3, 4]}))
    with pytest.raises(ValueError, match="below 4"):
        load(tmp_path, TARGET)


def test_copies_of_the_targets_embeddings_are_seen_as_such(tmp_path: Path) -> None:
    written(tmp_path, head(), "speculators")
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        weights | {"embed_tokens.weight": TARGET.model.embed_tokens.weight.detach().clone()}, tmp_path / "model.safetensors"
    )
    assert load(tmp_path, TARGET).config.own_embeddings is False
    assert load(tmp_path).config.own_embeddings is True
    save_file(weights | {"embed_tokens.weight": torch.ones(V, 32)}, tmp_path / "model.safetensors")
    assert torch.equal(load(tmp_path, TARGET).embed_tokens.weight, torch.ones(V, 32))


def test_speculators_without_the_flag_reads_as_vllm_reads_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, head(), "speculators")
    content = json.loads((tmp_path / "config.json").read_text())
    del content["norm_before_residual"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert load(tmp_path, TARGET).config.norm_before_residual is True
    assert "norm_before_residual" in caplog.text


def change(directory: Path, **tensors: torch.Tensor | None) -> None:
    weights = load_file(directory / "model.safetensors")
    for name, tensor in tensors.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"d2t": None}, "has no d2t"),
        ({"d2t": torch.arange(DV) + 60}, "offsets"),
        ({"d2t": torch.zeros(DV - 1, dtype=torch.long)}, "d2t has 39"),
        ({"t2d": torch.arange(V) < DV + 1}, "different tokens"),
        ({"norm.weight": None}, "norm.weight missing"),
        ({"fc.weight": torch.zeros(32, 64)}, "fc.weight"),
        ({"fc.bias": torch.zeros(32)}, "fc.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    written(tmp_path, head(), "eagle")
    change(tmp_path, **tensors)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, TARGET)


def test_pickles_and_other_models_are_refused(tmp_path: Path) -> None:
    written(tmp_path, head(), "eagle")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="save_file"):
        load(tmp_path, TARGET)
    other = tmp_path / "other"
    TARGET.save_pretrained(other)
    with pytest.raises(ValueError, match="no EAGLE-3 head"):
        load(other)
    assert not is_head(other) and not is_head(tmp_path / "nothing")
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "speculators_model_type": "dflash"}))
    with pytest.raises(ValueError, match="of dflash"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**content, "model_type": "qwen3"}))
    with pytest.raises(ValueError, match="type qwen3"):
        load(tmp_path)

"""Specs of published models from their configurations; what a configuration says goes before the table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import DiffusionGemmaConfig, LlamaConfig, PreTrainedConfig

from kdlib.diffusion import DiffusionSpec, spec_of
from kdlib.diffusion.known import known_spec
from kdlib.models import load_config
from tests.layouts.published import WORDS, write


def published(model_type: str, **values: Any) -> PreTrainedConfig:
    """A configuration of remote code, as transformers makes it of config.json."""
    made: type[PreTrainedConfig] = type("RemoteConfig", (PreTrainedConfig,), {"model_type": model_type})
    return made(**values)


LLADA = published("llada", mask_token_id=126336, eos_token_id=126081, pad_token_id=126081, d_model=4096)
DREAM = published("Dream", mask_token_id=151666, eos_token_id=151643, pad_token_id=151643, block_size=None)
BLOCKS = {"attention": "block_causal", "blocks_from": "sequence", "eos_padding": "block"}
CASES: list[tuple[str, PreTrainedConfig, dict[str, Any]]] = [
    ("llada", LLADA, {"mask_token_id": 126336, "eos_token_id": 126081, "layout": "llada"}),
    ("llada-silent", published("llada"), {"mask_token_id": 126336, "eos_token_id": 126081, "layout": "llada"}),
    ("llada-moe", published("llada", num_experts=64, eos_token_id=156892), {"mask_token_id": 156895, "eos_token_id": 156892}),
    ("dream", DREAM, {"mask_token_id": 151666, "eos_token_id": 151643, "shift": True, "layout": "dream"}),
    (
        "llada2",
        published("llada2_moe", pad_token_id=156892),
        {"mask_token_id": 156895, "eos_token_id": 156892, "block_length": 32, **BLOCKS},
    ),
    (
        "sdar",
        published("sdar", block_size=16, eos_token_id=[151645, 151643]),
        {"mask_token_id": 151669, "eos_token_id": 151645, "block_length": 16, "layout": "sdar", **BLOCKS},
    ),
    (
        "fast-dllm-v2",
        published("Fast_dLLM_Qwen", bd_size=32, eos_token_id=151645),
        {"mask_token_id": 151665, "eos_token_id": 151645, "block_length": 32, "shift": True, "layout": "fast_dllm", **BLOCKS},
    ),
    (
        "diffusion-gemma",
        DiffusionGemmaConfig(canvas_length=128),
        {"mask_token_id": None, "eos_token_id": 1, "attention": "canvas", "block_length": 128, "eos_padding": "none"},
    ),
]


@pytest.mark.parametrize(("config", "fields"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_published_models(config: PreTrainedConfig, fields: dict[str, Any]) -> None:
    assert spec_of(config) == DiffusionSpec(**fields)


def test_a_mapped_checkpoint_is_known_by_its_own_config(tmp_path: Path) -> None:
    wanted = {"mask_token_id": WORDS, "eos_token_id": 2}
    assert spec_of(load_config(str(write(tmp_path / "a", "llada")))) == DiffusionSpec(**wanted, layout="llada")
    assert spec_of(load_config(str(write(tmp_path / "b", "Dream")))) == DiffusionSpec(**wanted, shift=True, layout="dream")


def test_what_kdlib_wrote_goes_before_the_model_type() -> None:
    spec = DiffusionSpec(mask_token_id=7, attention="block_causal", block_length=8, blocks_from="response")
    assert spec_of(published("llada", diffusion={**spec.to_json(), "decoding": {"gen_length": 64}})) == spec


def test_other_models_are_no_diffusion_models() -> None:
    assert known_spec(LlamaConfig()) is None
    with pytest.raises(ValueError, match="my-model is no diffusion language model that kdlib knows"):
        spec_of(LlamaConfig(name_or_path="my-model"))

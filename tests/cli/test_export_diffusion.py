"""``kdlib export diffusion``: a model with its decoding settings, as published where it was, and mistakes in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from kdlib.decoding import DiffusionDecoder
from kdlib.decoding.diffusion_decoder import decoder_of
from kdlib.decoding.strategies import ConfidenceThreshold, EntropyThreshold
from kdlib.diffusion import DiffusionSpec, as_diffusion, spec_of, with_mask_token
from kdlib.models import load_model
from tests.cli.conftest import Command
from tests.layouts.published import WORDS, read, write
from tests.tiny import tiny_llama, tiny_tokenizer

IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llada/ (as published), dllm/ (made by kdlib, with settings), blocks/ (block-causal), adapter/ (of dllm), causal/."""
    root = tmp_path_factory.mktemp("models")
    write(root / "llada", "llada", dtype=torch.bfloat16)
    tokenizer = tiny_tokenizer()
    mask = with_mask_token(tokenizer, "<|mask|>")
    spec = DiffusionSpec(mask_token_id=mask, eos_token_id=2)
    for name, made in (("dllm", spec), ("blocks", DiffusionSpec(mask_token_id=mask, attention="block_causal", block_length=8))):
        model = as_diffusion(tiny_llama(WORDS), made)
        if name == "dllm":
            model.config.diffusion["decoding"] = DiffusionDecoder(gen_length=16, block_length=4).to_json()
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    lora = LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = get_peft_model(load_model(str(root / "dllm")), lora)
    adapted.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    tiny_llama(WORDS).save_pretrained(root / "causal")
    tiny_tokenizer().save_pretrained(root / "causal")
    return root


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def test_a_published_model_stays_as_published(kdlib: Command, models: Path, tmp_path: Path) -> None:
    options = {"strategy": "{EntropyThreshold: {threshold: 0.45}}", "gen_length": 24, "block_length": 8, "cache": "prefix"}
    done = kdlib("export", "diffusion", model=models / "llada", output_path=tmp_path / "out", **options)
    assert done.code == 0, done.err
    before, after = read(models / "llada"), read(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "llada" and config["d_model"] == 32
    assert config["diffusion"]["decoding"]["strategy"] == {"EntropyThreshold": {"threshold": 0.45}}
    model = load_model(str(tmp_path / "out"))
    assert spec_of(model.config) == DiffusionSpec(mask_token_id=WORDS, eos_token_id=2, layout="llada")
    assert decoder_of(model.config) == DiffusionDecoder(
        gen_length=24, block_length=8, strategy=EntropyThreshold(threshold=0.45), cache="prefix"
    )
    assert (tmp_path / "out" / "modeling_llada.py").is_file()


def test_what_is_left_out_is_as_the_model_has_it(kdlib: Command, models: Path, tmp_path: Path) -> None:
    done = kdlib("export", "diffusion", model=models / "dllm", output_path=tmp_path / "out", temperature=0.5)
    assert done.code == 0, done.err
    model = load_model(str(tmp_path / "out"))
    assert decoder_of(model.config) == DiffusionDecoder(gen_length=16, block_length=4, temperature=0.5)
    assert torch.equal(logits(model), logits(load_model(str(models / "dllm"))))


def test_the_printed_python_runs(kdlib: Command, models: Path, tmp_path: Path) -> None:
    done = kdlib("export", "diffusion", model=models / "dllm", output_path=tmp_path / "out", gen_length=5)
    names: dict[str, Any] = {}
    exec(done.out.split("\npython\n")[1], names)
    assert names["output"].sequences.shape[1] == len(names["prompts"][0]) + 5
    assert names["spec"].mask_token_id not in names["output"].sequences[0, -5:]
    assert json.loads(done.out.splitlines()[0].partition("decodes with ")[2]) == decoder_of(names["model"].config).to_json()


def test_an_adapter_is_merged(kdlib: Command, models: Path, tmp_path: Path) -> None:
    done = kdlib("export", "diffusion", model=models / "adapter", output_path=tmp_path / "out")
    assert done.code == 0, done.err
    adapted = PeftModel.from_pretrained(load_model(str(models / "dllm")), models / "adapter")
    merged = load_model(str(tmp_path / "out"))
    torch.testing.assert_close(logits(merged), logits(adapted), atol=1e-5, rtol=1e-5)
    assert (logits(merged) - logits(load_model(str(models / "dllm")))).abs().max() > 1e-3
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    assert decoder_of(merged.config).gen_length == 16


def test_the_same_model_is_exported_again_and_no_other(kdlib: Command, models: Path, tmp_path: Path) -> None:
    for threshold in (0.9, 0.7):
        strategy = f"{{ConfidenceThreshold: {{threshold: {threshold}}}}}"
        assert kdlib("export", "diffusion", model=models / "dllm", output_path=tmp_path / "out", strategy=strategy).code == 0
    assert decoder_of(load_model(str(tmp_path / "out")).config).strategy == ConfidenceThreshold(threshold=0.7)
    done = kdlib("export", "diffusion", model=models / "llada", output_path=tmp_path / "out")
    assert done.code != 0 and "is not empty and no export of this model: choose another output path" in done.err


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "causal": ({"model": "causal"}, "is no diffusion language model that kdlib knows: train it as one with kdlib diffusion"),
    "strategy": ({"strategy": "Fastest"}, "no strategy Fastest: choose LowConfidence"),
    "option": ({"strategy": "{ConfidenceThreshold: {steps: 3}}"}, "ConfidenceThreshold has no option steps"),
    "length": ({"gen_length": 0}, "choose at least 1 token each"),
    "cache": ({"cache": "block"}, "cache block is for block-causal attention"),
    "blocks": ({"model": "blocks", "block_length": 4}, "blocks of 8: decode with that block_length, not 4"),
    "path": ({"model": "nowhere"}, "nowhere"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(kdlib: Command, models: Path, tmp_path: Path, mistake: str) -> None:
    changes, message = MISTAKES[mistake]
    options = {"model": "dllm", **changes}
    done = kdlib("export", "diffusion", **{**options, "model": models / options["model"], "output_path": tmp_path / "out"})
    assert done.code != 0 and message in done.err and len(done.err.strip().splitlines()) == 1, done.err
    assert not (tmp_path / "out").exists()

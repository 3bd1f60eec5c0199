"""Back into the published layout: names, config.json, remote code; what is written computes the same under both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from kdlib import layouts
from kdlib.diffusion import DiffusionSpec, as_diffusion, spec_of
from kdlib.models import load_model
from kdlib.trainers import DiffusionConfig, DiffusionTrainer
from tests.layouts.published import LOGITS, PUBLISHED, WORDS, V, read, write
from tests.tiny import tiny_tokenizer
from tests.trainers.small import ROWS, settings_of

IDS = torch.randint(0, V, (9,), generator=torch.Generator().manual_seed(1))
MODEL_TYPES = ["llada", "Dream"]


def config_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS[None]).logits[0]
    return found


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("shards", [1, 2])
def test_load_save_load(tmp_path: Path, model_type: str, shards: int) -> None:
    source = write(tmp_path / "source", model_type, shards=shards)
    model = load_model(str(source), dtype="float32")
    assert layouts.save(model, tmp_path / "again")
    before, after = read(source), read(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert config_of(tmp_path / "again") == {**PUBLISHED[model_type], "torch_dtype": "float32"}
    assert {file.name for file in (tmp_path / "again").glob("*.py")} == {file.name for file in source.glob("*.py")}
    assert torch.equal(logits(load_model(str(tmp_path / "again"))), logits(model))


def test_a_tied_llada_has_no_head_on_disk(tmp_path: Path) -> None:
    source = write(tmp_path / "source", "llada", weight_tying=True)
    assert layouts.save(load_model(str(source), dtype="float32"), tmp_path / "again")
    assert read(tmp_path / "again").keys() == read(source).keys()


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_published_code_reads_what_was_changed(tmp_path: Path, model_type: str) -> None:
    """A new mask token's row, other weights and another dtype; the test's own forward pass stands for the published code."""
    source = write(tmp_path / "source", model_type)
    model = load_model(str(source), dtype="float32")
    as_diffusion(model, DiffusionSpec(mask_token_id=V + 2, eos_token_id=2, layout=model_type))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    assert layouts.save(model, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["mask_token_id"] == V + 2 and config["vocab_size"] == V + 3
    assert config.get("embedding_size", V + 3) == V + 3 and config["auto_map"] == PUBLISHED[model_type]["auto_map"]
    torch.testing.assert_close(LOGITS[model_type](read(tmp_path / "out"), config, IDS), logits(model), atol=1e-5, rtol=1e-5)
    again = load_model(str(tmp_path / "out"))
    assert spec_of(again.config) == DiffusionSpec(mask_token_id=V + 2, eos_token_id=2, layout=model_type)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_final_of_a_run_is_in_the_published_layout(tmp_path: Path, model_type: str, lora: bool) -> None:
    source = write(tmp_path / "source", model_type, dtype=torch.bfloat16, torch_dtype="bfloat16")
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM") if lora else None
    student = load_model(str(source))
    trainer = DiffusionTrainer(
        student,
        args=settings_of(DiffusionConfig, tmp_path / "run"),
        train_dataset=ROWS,
        processing_class=tiny_tokenizer(),
        peft_config=adapter,
    )
    final = trainer.save_final(tmp_path / "final")
    before, after = read(source), read(final)
    assert {name: w.shape for name, w in before.items()} == {name: w.shape for name, w in after.items()}
    assert {w.dtype for w in after.values()} == {torch.bfloat16}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert (len(changed) == 14) == lora, "the adapter is merged into the seven matrices of each layer"
    assert config_of(final)["model_type"] == model_type and config_of(final)["torch_dtype"] == "bfloat16"
    model = load_model(str(final), dtype="float32")
    torch.testing.assert_close(logits(model), LOGITS[model_type](after, config_of(final), IDS), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_checkpoint_of_the_trainer_is_one_of_transformers(tmp_path: Path, model_type: str) -> None:
    """The Trainer reads its checkpoints by the names in memory; saved from there, the model is as published again."""
    source = write(tmp_path / "source", model_type)
    model = load_model(str(source), dtype="float32")
    model.save_pretrained(tmp_path / "checkpoint")
    assert read(tmp_path / "checkpoint").keys() == model.state_dict().keys()
    assert AutoConfig.from_pretrained(tmp_path / "checkpoint").is_causal is False
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert torch.equal(logits(stock), logits(model)) and spec_of(stock.config) == spec_of(model.config)
    assert layouts.save(stock, tmp_path / "out")
    assert read(tmp_path / "out").keys() == read(source).keys()
    assert config_of(tmp_path / "out") == {**PUBLISHED[model_type], "torch_dtype": "float32"}
    assert spec_of(model.config).mask_token_id == WORDS

"""final/: the trained student, loadable as it is, in the dtype it was published in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kdlib.trainers import DistillationTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.small import V, saved, trainer_of


def trained(directory: Path, model: str, **config: object) -> tuple[DistillationTrainer, Path]:
    trainer = trainer_of(directory / "run", model=model, config={"max_steps": 2, **config})
    trainer.train()
    return trainer, trainer.save_final(directory / "final")


def written(final: Path) -> dict[str, torch.Tensor]:
    with safe_open(final / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping


@pytest.mark.parametrize("tied", [False, True])
def test_final_is_the_trained_student(tmp_path: Path, tied: bool) -> None:
    source = tiny_llama(V, tie_word_embeddings=tied)
    trainer, final = trained(tmp_path, saved(tmp_path / "student", source))
    loaded = AutoModelForCausalLM.from_pretrained(final)
    assert loaded.config.tie_word_embeddings == tied
    assert ("lm_head.weight" in written(final)) != tied, "tied weights are written once"
    changed = 0
    for (name, ours), theirs, start in zip(
        trainer.model.named_parameters(), loaded.parameters(), source.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
        changed += not torch.equal(ours, start)
    assert changed > 10


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_final_is_written_in_the_published_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    trainer, final = trained(tmp_path, saved(tmp_path / "student", tiny_llama(V).to(dtype)))
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}, "master weights are float32"
    assert {tensor.dtype for tensor in written(final).values()} == {dtype}
    assert json.loads((final / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    for name, p in trainer.model.named_parameters():
        assert torch.equal(written(final)[name], p.to(dtype)), name
    assert {p.dtype for p in AutoModelForCausalLM.from_pretrained(final).parameters()} == {dtype}
    assert str(trainer.model.config.dtype).endswith("float32"), "training may go on"


def test_tokenizer_chat_template_and_ending_come_along(tmp_path: Path) -> None:
    _, final = trained(tmp_path, saved(tmp_path / "student", tiny_llama(V)), from_scratch=True)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    generation = GenerationConfig.from_pretrained(final)
    assert (generation.eos_token_id, generation.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.config.use_cache and generation.use_cache is not False, "generates with a cache"
    assert model.generate(torch.tensor([[1, 20]]), max_new_tokens=3).shape[1] >= 3

"""LoRA students: what is trained, and that the head's adapter gets the gradient of plain autograd."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdlib.trainers import DistillationTrainer
from tests.tiny import tiny_llama
from tests.trainers.small import (
    ROWS,
    Gradients,
    V,
    forward_kl,
    logged,
    plain_gradients,
    plain_loss,
    saved,
    trainer_of,
)

ATTENTION = ["q_proj", "v_proj"]


def lora(**options: Any) -> LoraConfig:
    """Rank 4 on two projections, with B drawn at random so that no gradient is 0 in the first step."""
    given = {"target_modules": ATTENTION, "r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return LoraConfig(task_type="CAUSAL_LM", **given)


def adapted(directory: Path, peft_config: LoraConfig, **config: Any) -> tuple[DistillationTrainer, Gradients]:
    gradients = Gradients()
    options = {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "max_grad_norm": 1e9,
        **config,
    }
    trainer = trainer_of(
        directory,
        rows=ROWS[:8],
        model=tiny_llama(V).double(),
        teacher=tiny_llama(V, seed=1).double(),
        callbacks=[gradients],
        peft_config=peft_config,
        config=options,
    )
    return trainer, gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({}, "lora_"),
        ({"target_modules": [*ATTENTION, "lm_head"]}, "lora_"),
        ({"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, ("lora_", "modules_to_save")),
        ({"use_rslora": True, "target_modules": ["down_proj", "lm_head"]}, "lora_"),
    ],
)
def test_only_the_adapter_is_trained_with_the_gradient_of_autograd(
    tmp_path: Path, options: dict[str, Any], trained: str | tuple[str, ...], checkpointing: bool
) -> None:
    trainer, gradients = adapted(tmp_path, lora(**options), gradient_checkpointing=checkpointing)
    before = copy.deepcopy(trainer.model)
    marks = (trained,) if isinstance(trained, str) else trained
    trainer.train()

    expected = plain_loss(before, tiny_llama(V, seed=1).double(), trainer.train_dataset, forward_kl)
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-6)]
    wanted = plain_gradients(before, expected)
    assert gradients.steps[0].keys() == wanted.keys()
    for name, value in wanted.items():
        assert any(mark in name for mark in marks), name
        torch.testing.assert_close(gradients.steps[0][name], value, rtol=1e-6, atol=1e-8, msg=name)
    for (name, old), new in zip(before.named_parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(old, new) != (name in wanted), name


def test_an_adapter_learns(tmp_path: Path) -> None:
    config = lora(target_modules=[*ATTENTION, "lm_head"], init_lora_weights=True)
    trainer, _ = adapted(tmp_path, config, max_steps=8, learning_rate=1e-2)
    trainer.train()
    losses = logged(trainer)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("bf16", [False, True])
def test_the_base_of_an_adapter_keeps_its_published_dtype(tmp_path: Path, bf16: bool) -> None:
    student = saved(tmp_path / "student", tiny_llama(V).to(torch.bfloat16))
    trainer = trainer_of(
        tmp_path / "run",
        model=student,
        peft_config=lora(target_modules=[*ATTENTION, "lm_head"]),
        config={"bf16": bf16},
    )
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters()}
    assert {d for name, d in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    assert {d for name, d in dtypes.items() if "lora_" in name} == {torch.float32}
    before = copy.deepcopy(trainer.model).float()
    trainer.train()
    expected = plain_loss(before, tiny_llama(V, seed=1), trainer.train_dataset.select(_first(trainer)), forward_kl)
    assert logged(trainer) == [pytest.approx(expected.item(), rel=3e-2)]


def _first(trainer: DistillationTrainer) -> list[int]:
    """The rows of the first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    ids = trainer.train_dataset["sample_id"][:]
    return [ids.index(sample) for sample in batch["sample_id"].tolist()]


@pytest.mark.parametrize("merge", [True, False])
def test_final_holds_the_merged_student_or_the_adapter(tmp_path: Path, merge: bool) -> None:
    student = saved(tmp_path / "student", tiny_llama(V))
    config = lora(target_modules=[*ATTENTION, "lm_head"])
    trainer = trainer_of(tmp_path / "run", model=student, peft_config=config, config={"merge_adapter": merge, "max_steps": 2})
    trainer.train()
    final = trainer.save_final(tmp_path / "final")
    assert (final / "adapter_config.json").exists() != merge
    assert isinstance(trainer.model, PeftModel), "training may go on with the adapter"
    loaded = AutoModelForCausalLM.from_pretrained(final)
    ids = torch.arange(3, 60)[None]
    torch.testing.assert_close(_logits(loaded, ids), _logits(trainer.model, ids), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["lm_head"], "lora_dropout": 0.1}, "LoRA dropout on lm_head is not supported"),
        ({"target_modules": ["lm_head"], "use_dora": True}, "one plain LoRA adapter on lm_head"),
    ],
)
def test_adapters_that_the_head_cannot_express_are_refused_before_training(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        adapted(tmp_path, lora(**options))

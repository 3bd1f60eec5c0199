"""What may not matter to consistency training: batches, precision, checkpoints, resuming; and its memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdlib.teachers import SelfTeacher
from kdlib.trainers import JacobiTrainer
from tests.tiny import tiny_llama
from tests.trainers.jacobi_plain import plain_ar, plain_consistency, trajectories
from tests.trainers.jacobi_steps import (
    FORCING,
    ROWS,
    THREE,
    jacobi_trainer,
    one_step,
)
from tests.trainers.small import Logits, V, assert_same, double, forward_kl, logged, lora, weights_of


def test_lora_is_merged_into_what_is_published(tmp_path: Path) -> None:
    trainer = jacobi_trainer(tmp_path, ROWS, model=tiny_llama(V), peft_config=lora(), config={"max_steps": 3})
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    merged = AutoModelForCausalLM.from_pretrained(trainer.save_final(tmp_path / "final")).eval()
    ids = ROWS[0].ids
    with torch.no_grad():
        torch.testing.assert_close(
            merged(torch.tensor([ids])).logits, trainer.model.eval()(input_ids=torch.tensor([ids])).logits, rtol=1e-4, atol=1e-4
        )


def shapes(rows: int) -> list[dict[str, int]]:
    return [{"per_device_train_batch_size": size, "gradient_accumulation_steps": rows // size} for size in (rows, rows // 4, 1)]


SOURCES: list[dict[str, Any]] = [
    {"state_source": "stored"},
    {"state_source": "stored", "states_per_block": 2, "blocks_per_row": 2},
    {"state_source": "stored", "consistency": "local"},
    {"state_source": "student", "init": "random"},
    {"state_source": "noise", "schedule": "random", "context": "noisy", "window_size": 2},
]


@pytest.mark.parametrize("options", SOURCES, ids=str)
def test_how_a_step_is_split_and_padded_does_not_matter(tmp_path: Path, options: dict[str, Any]) -> None:
    """Eight rows at once, in four and in eight micro-batches: the draws are the rows' own, the means the step's."""
    rows = trajectories(seed=2, lengths=(13, 8, 3, 10, 5, 11, 2, 9), states=4)
    expected: dict[str, Tensor] = {}
    for shape in shapes(len(rows)):
        trainer, found = one_step(tmp_path, rows, config={**options, **shape})
        expected = expected or found
        assert_same(found, expected)
        scored = logged(trainer, "scored_tokens")[0]
        assert scored > sum(len(row.completion) for row in rows), "both terms have rows"


def text_loss(directory: Path, block_size: int) -> tuple[float, dict[str, Tensor]]:
    rows = Dataset.from_list([row.row() for row in trajectories(seed=3, lengths=(16, 24, 8))])
    config = {"block_size": block_size, "state_source": "noise", "consistency_weight": 0.0}
    trainer, found = one_step(directory, rows, config=config)
    assert logged(trainer)[0] == pytest.approx(logged(trainer, "ar/cross_entropy")[0], rel=1e-6)
    return logged(trainer)[0], found


def test_the_text_weighs_the_same_however_many_blocks_there_are(tmp_path: Path) -> None:
    whole, expected = text_loss(tmp_path, 8)
    halves, found = text_loss(tmp_path, 4)
    assert halves == pytest.approx(whole, rel=1e-9)
    assert_same(found, expected)


@pytest.mark.parametrize("options", [{"state_source": "student"}, {"state_source": "noise"}, FORCING], ids=str)
def test_evaluation_does_not_depend_on_its_batch_size(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = trajectories(seed=4, lengths=(7, 12, 5, 9, 3, 8, 6), states=3)
    found = []
    for size in (1, 3, 7):
        trainer = jacobi_trainer(
            tmp_path,
            rows,
            eval_dataset=Dataset.from_list([row.row() for row in rows]),
            config={**options, "per_device_eval_batch_size": size},
        )
        measured = trainer.evaluate()
        found.append([measured[key] for key in ("eval_loss", "eval_kl_forward", "eval_ar/cross_entropy")])
    assert found[1:] == [pytest.approx(found[0], rel=1e-9)] * 2
    assert found[0][2] == pytest.approx(plain_ar(double(), rows).item(), rel=1e-6)
    assert found[0][0] == pytest.approx(found[0][1] + found[0][2], rel=1e-6)


def test_evaluation_is_the_plain_loss(tmp_path: Path) -> None:
    dataset = Dataset.from_list([row.row() for row in ROWS])
    measured = jacobi_trainer(tmp_path, ROWS, eval_dataset=dataset).evaluate()
    student = double()
    expected = plain_consistency(student, ROWS, forward_kl) + plain_ar(student, ROWS)
    assert measured["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, reentrant: bool) -> None:
    _, expected = one_step(tmp_path, THREE, config=FORCING)
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    _, found = one_step(tmp_path, THREE, config={**FORCING, **options})
    assert_same(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("options", [{}, {"state_source": "student"}], ids=str)
def test_bf16_stays_close(tmp_path: Path, options: dict[str, Any]) -> None:
    found = []
    for bf16 in (False, True):
        trainer = jacobi_trainer(tmp_path, ROWS, model=tiny_llama(V), config={"bf16": bf16, "max_steps": 3, **options})
        trainer.train()
        found.append(torch.tensor(logged(trainer)))
    difference = (found[1] / found[0] - 1).abs()
    assert (difference > 1e-6).all(), "bf16 computed in float32"
    assert (difference < 5e-2).all()


RESUMED: list[dict[str, Any]] = [
    {"state_source": "stored", "states_per_block": 2, "blocks_per_row": 2},
    {"state_source": "student", "init": "random", "attention_dropout": 0.2},
    {"state_source": "noise", "schedule": "random", "context": "noisy", "window_size": 3},
    {"state_source": "stored", "consistency": "local", "teacher": "ema"},
]


@pytest.mark.parametrize("options", RESUMED, ids=str)
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = trajectories(seed=6, lengths=(13, 8, 5, 10, 7, 9), states=4)
    given = dict(options)
    dropout = given.pop("attention_dropout", 0.0)
    config = {**given, "max_steps": 4, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 2}
    kind = config.pop("teacher", "student")

    def trainer(name: str) -> JacobiTrainer:
        model = tiny_llama(V, attention_dropout=dropout)
        return jacobi_trainer(tmp_path / name, rows, model=model, teacher=SelfTeacher(kind), config=config)

    whole = trainer("whole")
    whole.train()
    resumed = trainer("whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, expected in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], expected), name
    assert logged(resumed)[-2:] == logged(whole)[-2:]
    assert len(set(logged(whole))) == 4


@pytest.mark.parametrize("states", [1, 4])
def test_logits_of_all_states_are_never_there_at_once(tmp_path: Path, states: int) -> None:
    """The largest [rows, V] is a chunk of the kernel, whatever the number of blocks."""
    rows = trajectories(seed=7, lengths=(160,) * 4, states=4)
    trainer = jacobi_trainer(tmp_path, rows, model=tiny_llama(V), config={"states_per_block": states})
    with Logits() as seen:
        trainer.train()
    consistency = logged(trainer, "scored_tokens")[0] - 4 * 160
    assert consistency > states * 250
    assert 0 < seen.rows <= 256

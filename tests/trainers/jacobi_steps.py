"""A trainer of a tiny float64 student, one of its steps, and the assertion that it is the plain computation's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import TrainerCallback

from kdlib.trainers import JacobiConfig, JacobiTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.jacobi_plain import N, Pick, Trajectory, nearest, trajectories
from tests.trainers.small import (
    Gradients,
    V,
    logged,
    plain_gradients,
    settings_of,
)

ROWS = trajectories()
THREE = trajectories(seed=1, states=3, drop=0.2)  # three states of most blocks, some blocks left out
PLAIN = {"block_size": N, "ar_weight": 1.0, "max_grad_norm": 1e9}  # the sum of both terms, its gradients as they are
NOISIEST = {"schedule": "progressive", "min_noise": 1.0, "max_noise": 1.0}  # one state and no other
FORCING = {"schedule": "progressive", "context": "noisy", "window_size": 2, "min_noise": 0.4}


def double(seed: int = 0, **config: Any) -> Any:
    return tiny_llama(V, seed=seed, **config).double()


def jacobi_trainer(
    directory: Path, rows: Sequence[Trajectory] | Dataset, *, config: dict[str, Any] | None = None, **given: Any
) -> JacobiTrainer:
    """A trainer of a tiny float64 student; one step over all rows unless ``config`` says otherwise."""
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list([row.row() for row in rows])
    options = {"per_device_train_batch_size": len(dataset), **PLAIN, **(config or {})}
    arguments = {"model": double(), "processing_class": tiny_tokenizer(), **given}
    return JacobiTrainer(**arguments, args=settings_of(JacobiConfig, directory, **options), train_dataset=dataset)


def noisiest(row: Trajectory) -> Pick:
    return nearest(lambda number: 1.0, row.text)


def rising(row: Trajectory, *, window: int = 2) -> Pick:
    return nearest(lambda number: 0.4 + 0.6 * (number % window) / (window - 1), row.text)


def one_step(directory: Path, rows: Any, **given: Any) -> tuple[JacobiTrainer, dict[str, Tensor]]:
    gradients = Gradients()
    trainer = jacobi_trainer(directory, rows, callbacks=[gradients], **given)
    trainer.train()
    return trainer, gradients.steps[0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float = 1e-6) -> None:
    """Llama's norms are float32 whatever the weights are, which gradients of one large pass and of many small ones show."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_step(
    trainer: JacobiTrainer,
    found: dict[str, Tensor],
    student: nn.Module,
    *,
    consistency: Tensor,
    ar: Tensor,
    weight: float = 1.0,
    term: str = "ar/cross_entropy",
) -> None:
    """The step's loss and gradients are those of the plain computation."""
    total = consistency + weight * ar
    assert consistency.item() > 1e-3, "it must have something to teach"
    assert logged(trainer) == [pytest.approx(total.item(), rel=1e-6)]
    assert logged(trainer, term) == [pytest.approx(ar.item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, total))


class Weights(TrainerCallback):
    """The student as it is before every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.steps.append({name: x.clone() for name, x in given["model"].state_dict().items()})


def lora(**options: Any) -> LoraConfig:
    """B drawn at random, so that the adapter changes what the model says from the first step on."""
    given = {"target_modules": ["q_proj", "v_proj", "lm_head"], "r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return LoraConfig(task_type="CAUSAL_LM", **given)

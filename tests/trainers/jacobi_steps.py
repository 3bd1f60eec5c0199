"""A trainer of a tiny float64 student, one of its steps, and the assertion that it is the plain computation's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from torch import Tensor, nn

from kdlib.trainers import JacobiConfig, JacobiTrainer
from tests.tiny import tiny_tokenizer
from tests.trainers.jacobi_plain import N, Pick, Trajectory, nearest, trajectories
from tests.trainers.small import Gradients, assert_same, double, logged, plain_gradients, settings_of

ROWS = trajectories()
THREE = trajectories(seed=1, states=3, drop=0.2)  # three states of most blocks, some blocks left out
PLAIN = {"block_size": N, "ar_weight": 1.0, "max_grad_norm": 1e9}  # the sum of both terms, its gradients as they are
NOISIEST = {"schedule": "progressive", "min_noise": 1.0, "max_noise": 1.0}  # one state and no other
FORCING = {"schedule": "progressive", "context": "noisy", "window_size": 2, "min_noise": 0.4}


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

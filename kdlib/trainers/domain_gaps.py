"""The student against the teacher on a few rows of each domain that are not trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from kdlib.kernels import row_values
from kdlib.models import evaluating
from kdlib.objectives import CrossEntropy
from kdlib.trainers.redirect import inside_forward
from kdlib.types import Positions, TeacherSignal

Row = dict[str, Any]
CHUNK = 256  # rows of the teacher's logits held at a time


class DomainGaps:
    """{domain: student's perplexity / teacher's} on ``probes``, rows of each domain.

    Every process measures all of them, so that all agree to the last bit. The teacher, which does not change, is asked once.
    """

    def __init__(self, probes: Mapping[str, Sequence[Row]]) -> None:
        self.probes = probes
        self._teacher: dict[str, float] = {}

    @torch.no_grad()
    def measure(self, trainer: Any) -> dict[str, float]:
        """exp(mean log-loss of the student - mean log-loss of the teacher) over the scored tokens of each domain."""
        if not self._teacher:
            self._teacher = {name: _mean(trainer, rows, teacher_losses) for name, rows in self.probes.items()}
        student = {name: _mean(trainer, rows, student_losses) for name, rows in self.probes.items()}
        return {name: math.exp(student[name] - self._teacher[name]) for name in student}


def _mean(trainer: Any, rows: Sequence[Row], losses: Any) -> float:
    """Nats per scored token, in batches of per_device_eval_batch_size."""
    size, total, count = trainer.args.eval_batch_size, 0.0, 0
    for start in range(0, len(rows), size):
        batch = send_to_device(trainer.data_collator(rows[start : start + size]), trainer.accelerator.device)
        positions = trainer.positions(batch)["distill"]
        total, count = total + losses(trainer, batch, positions).double().sum().item(), count + len(positions)
    return total / count


def student_losses(trainer: Any, batch: dict[str, Any], positions: Positions) -> Tensor:
    """-log q(label) [N] of the student as it stands, without dropout."""
    model = trainer.accelerator.unwrap_model(trainer.model)

    def forward(batch: dict[str, Any]) -> Tensor:
        return row_values(trainer.student_signal(model, batch, positions), None, CrossEntropy())

    with evaluating(model):
        found: Tensor = inside_forward(trainer.model_wrapped, model, forward, batch)
    return found


def teacher_losses(trainer: Any, batch: dict[str, Any], positions: Positions) -> Tensor:
    """-log p(label) [N] of a teacher with whole distributions."""
    with trainer.accelerator.autocast():
        signal: TeacherSignal = trainer.teacher.signal(batch, positions)
    chunks = [slice(start, start + CHUNK) for start in range(0, len(positions), CHUNK)]
    labels = positions.labels[:, None]
    return torch.cat([-signal.at(chunk, 1.0).logp.gather(-1, labels[chunk])[:, 0] for chunk in chunks])

"""The student's weights as an engine gets them, and how they outlive an interrupted run."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from kdlib.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Weights before optimizer step ``step`` (1-based), and what the student with them says about ``probes`` (nats).

    ``probes`` and ``expected`` are empty where nothing is compared.
    """

    step: int
    weights: list[tuple[str, Tensor]]
    probes: list[list[int]]
    expected: list[list[float]]

    def save(self, path: Path) -> None:
        """As safetensors, whole or not at all."""
        told = {"step": self.step, "probes": self.probes, "expected": self.expected}
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.weights}
        write_whole(path, save(tensors, metadata={name: json.dumps(value) for name, value in told.items()}))

    @staticmethod
    def load(path: Path) -> Snapshot:
        with safe_open(path, framework="pt") as file:
            weights = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118, it is no mapping
            told = {name: json.loads(value) for name, value in file.metadata().items()}
        return Snapshot(weights=weights, **told)

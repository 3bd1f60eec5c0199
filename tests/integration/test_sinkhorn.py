"""``kdlib distill --objective Sinkhorn`` in processes of its own: a step may be split over them, a run be cut anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdlib.objectives import Sinkhorn
from tests.integration.interrupted import interrupt
from tests.integration.runs import Material, alone_and_by_two, material, metrics, whole_and_killed

INTERRUPTED = f"{__file__}:InterruptedSinkhorn"
COMMON = ["--logging_steps", "1", "--learning_rate", "1e-3", "--objective.temperature", "0.5", "--objective.epsilon", "0.03"]
COMMON += ["--objective.iterations", "3"]
COMPARED = (
    "loss",
    "grad_norm",
    "sinkhorn",
    "divergence",
    "sinkhorn_marginal_error",
    "kl_reverse",
    "eval_loss",
    "eval_sinkhorn",
)


@dataclass(frozen=True, kw_only=True)
class InterruptedSinkhorn(Sinkhorn):
    """Sinkhorn that may be interrupted, given to the command as this file."""

    def init_state(self, max_steps: int = 1) -> dict[str, float]:
        return {"steps": 0.0}

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> dict[str, float]:
        interrupt(step)
        return {"steps": float(step)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return material(tmp_path_factory.mktemp("material"), rows=20, held_out=11)


def test_two_processes_move_sequences_as_one_does(tmp_path: Path, files: Material) -> None:
    """Three steps of 8 rows, the last with 4, of which one process has none; the rows drawn do not depend on the process."""
    words = [*files.words, "--eval_dataset_name", files.held_out, "--objective", "Sinkhorn", *COMMON]
    words += ["--objective.group", "sequence", "--objective.max_rows", "9", "--max_steps", "3", "--save_strategy", "no"]
    alone_and_by_two(tmp_path, words, compared=COMPARED)


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, files: Material) -> None:
    """The rows that take part in a step are those of a run that was not cut."""
    words = [*files.words, "--objective", INTERRUPTED, *COMMON, "--objective.max_rows", "20"]
    files_of_both = ["final/model.safetensors", "checkpoint-6/kdlib_state.json"]
    whole, cut = whole_and_killed(tmp_path, words, files=files_of_both)
    assert metrics(cut) == metrics(whole)

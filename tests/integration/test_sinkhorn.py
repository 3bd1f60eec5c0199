"""``kdlib distill --objective Sinkhorn`` in processes of its own: a step may be split over them, a run be cut anywhere."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from kdlib.objectives import Sinkhorn
from tests.integration.interrupted import interrupt
from tests.integration.runs import SINGLE, TORCHRUN, Material, completed, distill, material, metrics, values

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
    one = completed(tmp_path / "one", [*words, "--per_device_train_batch_size", "8"], launcher=SINGLE)
    shape = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"]
    two = completed(tmp_path / "two", [*words, *shape], launcher=TORCHRUN)
    assert values(two, "scored_tokens") == values(one, "scored_tokens")
    for key in COMPARED:
        wanted = values(one, key)
        assert len(wanted) == (1 if key.startswith("eval") else 3), key
        assert values(two, key) == pytest.approx(wanted, rel=1e-5, abs=1e-6), key


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, files: Material) -> None:
    """The rows that take part in a step are those of a run that was not cut."""
    words = [*files.words, "--objective", INTERRUPTED, *COMMON, "--objective.max_rows", "20"]
    words += ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    words += ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2"]
    whole, cut = completed(tmp_path / "whole", words), tmp_path / "run"
    killed = distill(cut, words, environment={"INTERRUPT_SIGNAL": "SIGKILL", "INTERRUPT_STEP": "5"})
    assert killed.returncode == -signal.SIGKILL and not (cut / "final").exists()
    again = distill(cut, words)
    assert again.returncode == 0, again.stderr[-4000:]
    assert f"resuming from {cut / 'checkpoint-4'}" in again.stderr
    for name in ("final/model.safetensors", "checkpoint-6/kdlib_state.json"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    assert metrics(cut) == metrics(whole)

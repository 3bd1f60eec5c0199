"""However a step's rows are split, loss, gradient norm and evaluation stay the same: by the real command.

Batch 8 at once is compared with 2 x 4 accumulated and with two processes. 20 rows in batches of 8 leave 4 for
an epoch's last step, and 11 evaluation rows fit no batch size, so that rows repeated to fill the last batches
of two processes would show.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.runs import SINGLE, TORCHRUN, Material, completed, material, values

SPLITS = {
    "at_once": (SINGLE, ["--per_device_train_batch_size", "8"]),
    "accumulated": (
        SINGLE,
        [
            "--per_device_train_batch_size",
            "2",
            "--gradient_accumulation_steps",
            "4",
            "--per_device_eval_batch_size",
            "3",
        ],
    ),
    "two_processes": (TORCHRUN, ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"]),
    "num_processes": (
        SINGLE,
        ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--num_processes", "2"],
    ),
}
STEPS, EVALUATIONS = 6, 3  # two evaluations on the way and the one at the end
LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", '["q_proj", "down_proj", "lm_head"]']
COMPARED = ("loss", "grad_norm", "kl_reverse", "eval_loss", "eval_kl_forward", "eval_top1_agreement")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return material(tmp_path_factory.mktemp("material"), rows=20, held_out=11)


def run(directory: Path, files: Material, split: str, more: list[str] | None = None) -> Path:
    launcher, shape = SPLITS[split]
    words = [*files.words, "--eval_dataset_name", files.held_out, *shape, *(more or [])]
    words += ["--max_steps", str(STEPS), "--logging_steps", "1", "--learning_rate", "1e-3"]
    words += ["--eval_strategy", "steps", "--eval_steps", "3", "--save_strategy", "no"]
    return completed(directory / split, words, launcher=launcher)


@pytest.fixture(scope="module")
def at_once(tmp_path_factory: pytest.TempPathFactory, files: Material) -> Path:
    return run(tmp_path_factory.mktemp("at_once"), files, "at_once")


def assert_equal_trajectories(found: Path, expected: Path, *, tolerance: float) -> None:
    assert values(found, "scored_tokens") == values(expected, "scored_tokens")
    for key in COMPARED:
        wanted = values(expected, key)
        assert len(wanted) == (EVALUATIONS if key.startswith("eval") else STEPS)
        assert values(found, key) == pytest.approx(wanted, rel=tolerance), key


@pytest.mark.parametrize("split", ["accumulated", "two_processes", "num_processes"])
def test_full_fine_tuning(tmp_path: Path, files: Material, at_once: Path, split: str) -> None:
    assert_equal_trajectories(run(tmp_path, files, split), at_once, tolerance=1e-5)
    losses = values(at_once, "loss")
    assert losses[-1] < 0.95 * losses[0], "the trajectories must go somewhere to tell anything"


def test_lora_with_a_scheduled_objective(tmp_path: Path, files: Material) -> None:
    """TAID's state moves with the loss of all processes."""
    words = [*LORA, "--objective", "TAID", "--objective.t_start", "0.2", "--objective.alpha", "0.5"]
    expected = run(tmp_path, files, "at_once", words)
    found = run(tmp_path, files, "two_processes", words)
    assert_equal_trajectories(found, expected, tolerance=1e-5)
    schedule = values(expected, "objective/t")
    assert len(set(schedule)) == STEPS
    assert values(found, "objective/t") == pytest.approx(schedule, rel=1e-5)


def test_on_policy(tmp_path: Path, files: Material) -> None:
    """Half of the rows are drawn by the student: the same draws, however a step's rows are split."""
    words = ["--objective", "ReverseKL", "--on_policy_fraction", "0.5", "--max_completion_length", "8"]
    expected = run(tmp_path, files, "at_once", words)
    for split in ("accumulated", "two_processes"):
        found = run(tmp_path, files, split, words)
        assert_equal_trajectories(found, expected, tolerance=1e-5)
        assert values(found, "completions/mean_length") == pytest.approx(values(expected, "completions/mean_length"))


def test_bf16(tmp_path: Path, files: Material, at_once: Path) -> None:
    """To 2%: a sum over 8 rows is rounded to bf16 once, over 2 rows four times, and Adam enlarges that."""
    expected = run(tmp_path, files, "at_once", ["--bf16", "true"])
    found = run(tmp_path, files, "accumulated", ["--bf16", "true"])
    for key in ("loss", "grad_norm", "eval_loss"):
        assert values(found, key) == pytest.approx(values(expected, key), rel=2e-2)
        assert values(found, key) == pytest.approx(values(at_once, key), rel=5e-2)
        assert values(found, key)[0] != pytest.approx(values(at_once, key)[0], rel=1e-6), "bf16 computed in float32"

"""A run that is killed or stopped and started again ends with the bits of one that never was, by the command.

Dropout, a scheduled objective, accumulation and several epochs: the random numbers, the optimizer, the state
of the objective and the order of the rows all have to come back.
"""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.trainers.callbacks import STATE_FILE
from tests.integration.runs import TORCHRUN, completed, distill, material, metrics

STEPS = 10
OBJECTIVE = str(Path(__file__).with_name("interrupted.py")) + ":InterruptedTAID"


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """14 rows in steps of 2 x 2: epochs of 4 steps, the last of which has one batch."""
    files = material(tmp_path_factory.mktemp("material"), rows=14, held_out=5, attention_dropout=0.2)
    words = [
        *files.words,
        "--eval_dataset_name",
        files.held_out,
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "5",
    ]
    words += ["--objective", OBJECTIVE, "--objective.t_start", "0.2", "--objective.alpha", "0.1"]
    words += [
        "--per_device_train_batch_size",
        "2",
        "--gradient_accumulation_steps",
        "2",
        "--learning_rate",
        "1e-3",
    ]
    return [
        *words,
        "--max_steps",
        str(STEPS),
        "--logging_steps",
        "1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "4",
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> Path:
    """The run that nothing interrupts."""
    return completed(tmp_path_factory.mktemp("runs") / "whole", words)


def interrupted(output: Path, words: list[str], name: str, *, step: int, **how: Any) -> int:
    environment = {"INTERRUPT_SIGNAL": name, "INTERRUPT_STEP": str(step)}
    return distill(output, words, environment=environment, **how).returncode


def assert_same_run(found: Path, expected: Path) -> None:
    for name in (
        "final/model.safetensors",
        f"checkpoint-{STEPS}/model.safetensors",
        f"checkpoint-{STEPS}/{STATE_FILE}",
    ):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name
    for name in ("optimizer.pt", "scheduler.pt"):
        assert_same(*(torch.load(run / f"checkpoint-{STEPS}" / name, weights_only=True) for run in (found, expected)))
    assert metrics(found) == metrics(expected)


def assert_same(a: Any, b: Any) -> None:
    """Equal to the last bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def test_killed_between_checkpoints(tmp_path: Path, words: list[str], whole: Path) -> None:
    """Also with a newer checkpoint whose writing was cut off, and half a line at the end of the metrics."""
    run = tmp_path / "run"
    assert interrupted(run, words, "SIGKILL", step=7) == -signal.SIGKILL
    assert [line["step"] for line in metrics(run) if "grad_norm" in line] == [1, 2, 3, 4, 5, 6]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]
    shutil.copytree(run / "checkpoint-4", run / "checkpoint-6", ignore=shutil.ignore_patterns(STATE_FILE, "optimizer.pt"))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "loss": 1.2')

    again = distill(run, words)
    assert again.returncode == 0, again.stderr[-4000:]
    assert f"resuming from {run / 'checkpoint-4'}" in again.stderr
    assert_same_run(run, whole)
    assert len((run / "command.txt").read_text().splitlines()) == 2


def test_stopped_by_signals(tmp_path: Path, words: list[str], whole: Path) -> None:
    """SIGTERM and then, after resuming, Ctrl-C: each saves and leaves with its own code."""
    run = tmp_path / "run"
    for name, step, code in (("SIGTERM", 3, 128 + signal.SIGTERM), ("SIGINT", 6, 128 + signal.SIGINT)):
        assert interrupted(run, words, name, step=step) == code
        assert (run / f"checkpoint-{step}" / STATE_FILE).is_file()
        assert not (run / "final").exists()
    assert_same_run(completed(run, words), whole)


def test_one_of_two_processes_is_told_to_stop(tmp_path: Path, words: list[str]) -> None:
    """Both agree on the step to stop after, and save a checkpoint together."""
    run = tmp_path / "run"
    assert interrupted(run, words, "SIGTERM", step=5, launcher=TORCHRUN) != 0
    assert (run / "checkpoint-6" / STATE_FILE).is_file()
    assert len(list((run / "checkpoint-6").glob("rng_state_*.pth"))) == 2
    assert [line["step"] for line in metrics(run) if "grad_norm" in line] == [1, 2, 3, 4, 5, 6]


def contents(run: Path) -> dict[str, bytes]:
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}


def test_a_finished_run_typed_again_says_so_and_a_changed_one_is_refused(words: list[str], whole: Path) -> None:
    before = contents(whole)
    again = distill(whole, words)
    assert again.returncode == 0
    assert "finished; --overwrite true starts it anew" in again.stderr
    assert str(whole / "final") in again.stdout

    changed = distill(whole, [*words, "--weight_decay", "0.1"])
    assert changed.returncode == 2
    assert "weight_decay: 0.0 -> 0.1" in changed.stderr
    assert len(changed.stderr.strip().splitlines()) == 1
    assert contents(whole) == before


def test_overwrite_starts_anew_and_leaves_other_files_alone(tmp_path: Path, words: list[str], whole: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "notes.txt").write_text("mine")
    (run / "final" / "old.txt").write_text("of the run before")
    completed(run, [*words, "--overwrite", "true", "--max_steps", "2"])
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "final" / "old.txt").exists()
    assert [line["step"] for line in metrics(run) if "grad_norm" in line] == [1, 2]
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-2"]
    assert len((run / "command.txt").read_text().splitlines()) == 1
    assert json.loads((run / "plan.json").read_text())["optimizer_steps"] == 2

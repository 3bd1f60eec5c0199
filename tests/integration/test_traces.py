"""``kdlib distill`` on pairs, by curriculum, domains and mixture: steps may be split over processes, runs be cut anywhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kdlib.objectives import REDI
from tests.integration.interrupted import interrupt
from tests.integration.runs import Material, alone_and_by_two, material, metrics, whole_and_killed

HERE = Path(__file__)
COMMON = ["--logging_steps", "1", "--learning_rate", "1e-3"]
REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
DOMAINS = ("apples", "numbers", "sky")
CHOICES = {
    "curriculum": (["--curriculum", "difficulty", "--curriculum_start", "0.4"], ["curriculum/open"]),
    "domains": (
        ["--domain_column", "domain", "--domain_rows", "2", "--domain_steps", "2"],
        [f"{what}/{name}" for what in ("domain", "domain_gap") for name in DOMAINS],
    ),
    "mixture": (
        ["--on_policy_fraction", "0.7", "--on_policy_minimum", "0.2", "--max_completion_length", "6"],
        ["mixture/on_policy", "mixture/entropy", "completions/mean_length"],
    ),
}


@dataclass(frozen=True, kw_only=True)
class InterruptedREDI(REDI):
    """REDI that may be interrupted, given to the command as this file."""

    def init_state(self, max_steps: int = 1) -> dict[str, float]:
        return {"steps": 0.0}

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> dict[str, float]:
        interrupt(step)
        return {"steps": float(step)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return material(tmp_path_factory.mktemp("material"), rows=1, held_out=1)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """With dropout, whose random numbers have to come back too."""
    return material(tmp_path_factory.mktemp("noisy"), rows=1, held_out=1, attention_dropout=0.1)


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(i: int) -> dict[str, Any]:
    right, wrong = " is four, because the sky is blue." * (1 + i % 2), " is" + " blue" * (1 + 3 * i % 5)
    return {"prompt": f"{'two plus ' * (1 + i % 3)}{i}", "chosen": right, "rejected": wrong}


def row(i: int) -> dict[str, Any]:
    asked = f"{'two plus ' * (1 + 5 * i % 7)}{i}"
    return {"prompt": asked, "completion": " is four.", "difficulty": 7 * i % 20, "domain": DOMAINS[i % 3]}


def untimed(run: Path) -> list[dict[str, Any]]:
    """The log without seconds, those of rollouts included."""
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in metrics(run)]


def test_two_processes_train_on_pairs_as_one_does(tmp_path: Path, files: Material) -> None:
    """20 pairs in steps of 8: the last step leaves one process without any; 11 pairs of evaluation fit no batch size."""
    words = ["--model", files.student, "--dataset_name", written(tmp_path / "pairs.jsonl", [pair(i) for i in range(20)])]
    words += ["--eval_dataset_name", written(tmp_path / "held_out.jsonl", [pair(i) for i in range(30, 41)])]
    words += ["--objective", "REDI", *COMMON, "--max_steps", "3", "--save_strategy", "no"]
    compared = ["loss", "grad_norm", *REWARDS, "eval_loss", *(f"eval_{name}" for name in REWARDS)]
    alone_and_by_two(tmp_path, words, compared=compared)


def test_a_killed_run_on_pairs_goes_on_to_the_same_bits(tmp_path: Path, noisy: Material) -> None:
    words = ["--model", noisy.student, "--dataset_name", written(tmp_path / "pairs.jsonl", [pair(i) for i in range(14)])]
    words += ["--objective", f"{HERE}:InterruptedREDI", *COMMON]
    whole, cut = whole_and_killed(tmp_path, words, files=["final/model.safetensors", "checkpoint-6/kdlib_state.json"])
    assert metrics(cut) == metrics(whole)


@pytest.mark.parametrize("choice", list(CHOICES))
def test_two_processes_choose_rows_as_one_does(tmp_path: Path, files: Material, choice: str) -> None:
    options, compared = CHOICES[choice]
    words = ["--model", files.student, "--teacher", files.teacher, *COMMON, *options]
    words += ["--dataset_name", written(tmp_path / "rows.jsonl", [row(i) for i in range(26 if choice == "domains" else 20)])]
    words += ["--max_steps", "3", "--save_strategy", "no"]
    alone_and_by_two(tmp_path, words, compared=["loss", "grad_norm", *compared])


@pytest.mark.parametrize("choice", list(CHOICES))
def test_a_killed_run_chooses_the_same_rows_again(tmp_path: Path, noisy: Material, choice: str) -> None:
    """Killed in step 5, gone on from step 4: in the middle of an epoch, with weights that have moved."""
    objective = f"{HERE.with_name('interrupted.py')}:InterruptedTAID"
    words = ["--model", noisy.student, "--teacher", noisy.teacher, "--objective", objective, *COMMON, *CHOICES[choice][0]]
    words += ["--dataset_name", written(tmp_path / "rows.jsonl", [row(i) for i in range(21)])]
    whole, cut = whole_and_killed(tmp_path, words, files=["final/model.safetensors", "checkpoint-6/kdlib_state.json"])
    assert untimed(cut) == untimed(whole)

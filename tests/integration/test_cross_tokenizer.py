"""Distillation between tokenizers in processes of its own: by the command, and where one process has no chunk.

Run as a module it is a worker: a trainer whose collator takes the chunks of one of its two rows away.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.objectives.cross import ALM, CrossTokenizerObjective, DualSpace, HybridULD
from tests.integration.interrupted import interrupt
from tests.integration.runs import Material, alone_and_by_two, metrics, values, whole_and_killed
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.cross_plain import PAIRS, cross_trainer, other_model, rows_of, teachers_tokenizer
from tests.trainers.small import logged, saved

ROOT = Path(__file__).resolve().parents[2]
INTERRUPTED = f"{__file__}:InterruptedALM"
COMMON = ["--logging_steps", "1", "--learning_rate", "1e-3", "--objective.balance", "gradient"]
OBJECTIVES = {
    "ALM": ["--objective.temperature", "4.0", "--objective.hidden", "0.5"],
    "HybridULD": [],
}
COMPARED = (
    "loss",
    "grad_norm",
    "objective/weight.distill",
    "objective/weight.cross_entropy",
    "alignment/chunked_ratio",
    "alignment/unread_ratio",
    "eval_loss",
    "eval_alignment/chunked_ratio",
    "eval_alignment/unread_ratio",
)


@dataclass(frozen=True, kw_only=True)
class InterruptedALM(ALM):
    """ALM that may be interrupted, given to the command as this file."""

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> dict[str, float]:
        interrupt(step)
        return super().update(state, global_loss, step)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """20 rows to train on and 11 held out, of unequal length; the models have tokenizers and widths of their own."""
    directory = tmp_path_factory.mktemp("material")
    rows = [{**PAIRS[i % 16], "completion": PAIRS[i % 16]["completion"] + " so" * (i // 16)} for i in range(31)]
    for name, chosen in (("train", rows[:20]), ("held_out", rows[20:])):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return Material(
        student=saved(directory / "student", tiny_llama(len(tiny_tokenizer()), attention_dropout=0.0)),
        teacher=saved(directory / "teacher", other_model(dtype=torch.float32), teachers_tokenizer()),
        train=str(directory / "train.jsonl"),
        held_out=str(directory / "held_out.jsonl"),
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_two_processes_train_as_one_does(tmp_path: Path, files: Material, objective: str) -> None:
    """Three steps of 8 rows, the last with 4, of which one process has none; weights follow the gradients of both."""
    words = [*files.words, "--eval_dataset_name", files.held_out, "--objective", objective, *OBJECTIVES[objective], *COMMON]
    words += ["--max_steps", "3", "--save_strategy", "no"]
    one = alone_and_by_two(tmp_path, words, compared=COMPARED)
    assert len(set(values(one, "objective/weight.distill"))) == 3


@pytest.mark.parametrize("peft", [[], ["--use_peft", "true", "--lora_r", "4"]], ids=["full", "adapter"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, files: Material, peft: list[str]) -> None:
    """With modules of the objective, balanced weights and half of the rows drawn by the student."""
    words = [*files.words, "--objective", INTERRUPTED, *OBJECTIVES["ALM"], *COMMON, *peft]
    words += ["--on_policy_fraction", "0.5", "--max_completion_length", "6", "--max_length", "64"]
    files_of_both = ["final/model.safetensors", "checkpoint-6/kdlib_state.json", "checkpoint-6/objective_modules.safetensors"]
    whole, cut = whole_and_killed(tmp_path, words, files=files_of_both)
    assert untimed(cut) == untimed(whole)


def untimed(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in metrics(output)]


# One process without chunks

WORKED: dict[str, CrossTokenizerObjective] = {
    "alm": ALM(temperature=4.0, hidden=0.5, balance="gradient"),
    "hybrid": HybridULD(),
    "dual": DualSpace(alignment="chunks"),
}


@pytest.mark.parametrize("name", WORKED)
def test_one_of_two_processes_has_no_chunk(tmp_path: Path, name: str) -> None:
    found = [worked(tmp_path / str(processes), name, processes=processes) for processes in (1, 2)]
    for key, expected in found[0].items():
        assert found[1][key] == pytest.approx(expected, rel=1e-6), key
    assert found[0]["alignment/chunked_ratio"][0] < 0.9, "a row of two has none"


def worked(output: Path, name: str, *, processes: int) -> dict[str, list[float]]:
    """What the worker logs in so many processes."""
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    call += ["-m", "tests.integration.test_cross_tokenizer", name, str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((output / "found.json").read_text())


def main(name: str, output: Path) -> None:
    """Four steps of two rows, of which the first of the data set has no chunk."""
    size = 2 // int(os.environ["WORLD_SIZE"])
    config = {"per_device_train_batch_size": size, "max_steps": 4, "learning_rate": 1e-2}
    trainer = cross_trainer(output, WORKED[name], rows=rows_of("pairs", 0, 2), config=config)
    unread, collate = trainer.train_dataset[0]["sample_id"], trainer.data_collator

    def without_chunks(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        here = batch["sample_id"] == unread
        for side in (batch, batch["other"]):
            side["chunk"][here] = -1
        return batch

    trainer.data_collator = without_chunks
    trainer.train()
    if trainer.is_world_process_zero():
        keys = ("loss", "grad_norm", "alignment/chunked_ratio", "scored_tokens")
        (output / "found.json").write_text(json.dumps({key: logged(trainer, key) for key in keys}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

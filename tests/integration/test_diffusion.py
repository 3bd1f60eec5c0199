"""``kdlib diffusion`` in processes of its own: a step may be split over processes, a run be cut anywhere."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest

from tests.integration.runs import SINGLE, TORCHRUN, completed, distill, metrics, values
from tests.tiny import tiny_llama
from tests.trainers.diffusion_plain import SIZE, text
from tests.trainers.diffusion_steps import dllm, masked_tokenizer
from tests.trainers.small import saved

COMMON = ["--block_length", "4", "--evaluate.limit", "0", "--logging_steps", "1", "--learning_rate", "1e-3"]
SPLITS = {
    "at_once": (SINGLE, ["--per_device_train_batch_size", "8"]),
    "two_processes": (TORCHRUN, ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"]),
}
COMPARED = ("loss", "grad_norm", "scored_tokens", "eval_loss")


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A diffusion model, and 20 and 11 rows of unequal length."""
    root, rng = tmp_path_factory.mktemp("material"), random.Random(0)
    model = tiny_llama(SIZE)
    model.config.is_causal, model.config.diffusion = False, dllm(eos_padding="length").config.diffusion
    for name, count in (("train", 20), ("held_out", 11)):
        rows = [text(rng, (2 + i % 3, 3 + 5 * i % 14), end=i % 2 == 0).row() for i in range(count)]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    student = saved(root / "student", model, masked_tokenizer())
    given = [
        "--model",
        student,
        "--dataset_name",
        str(root / "train.jsonl"),
        "--eval_dataset_name",
        str(root / "held_out.jsonl"),
    ]
    return [*given, "--response_length", "16", "--decoding.gen_length", "8", *COMMON]


def test_two_processes_make_the_same_steps(tmp_path: Path, words: list[str]) -> None:
    """20 rows in steps of 8 leave 4 for an epoch's last one, and 11 evaluation rows fit no batch size."""
    runs = {}
    for name, (launcher, shape) in SPLITS.items():
        given = [*words, "--objective.normalize", "sequence", *shape, "--max_steps", "4", "--save_strategy", "no"]
        runs[name] = completed(tmp_path / name, given, launcher=launcher, name="diffusion")
    for key in COMPARED:
        wanted = values(runs["at_once"], key)
        assert len(wanted) == (1 if key.startswith("eval") else 4), key
        assert values(runs["two_processes"], key) == pytest.approx(wanted, rel=1e-5), key


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, words: list[str]) -> None:
    """A teacher that is renewed each second step, masks in the order of its steps, and the round of the objective come back."""
    objective = str(Path(__file__).with_name("interrupted.py")) + ":InterruptedHalving"
    given = [*words, "--objective", objective, "--objective.refresh_steps", "2", "--objective.rounds", "3"]
    given += ["--masking", "trajectory", "--per_device_train_batch_size", "2"]
    given += ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "3"]
    whole = completed(tmp_path / "whole", given, name="diffusion")
    environment = {"INTERRUPT_SIGNAL": "SIGKILL", "INTERRUPT_STEP": "5"}
    killed = distill(tmp_path / "run", given, environment=environment, name="diffusion")
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "run" / "final").exists()
    again = distill(tmp_path / "run", given, name="diffusion")
    assert again.returncode == 0, again.stderr[-4000:]
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-3'}" in again.stderr
    for name in ("final/model.safetensors", "checkpoint-6/teacher_ema.safetensors", "samples/completions.jsonl"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name
    assert metrics(tmp_path / "run") == metrics(whole)

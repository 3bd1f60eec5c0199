"""``kdlib jacobi`` in processes of its own: a step may be split and a run cut anywhere, and a predictable text gets faster."""

from __future__ import annotations

import copy
import json
import random
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from kdlib.data.draft import sample_id
from kdlib.decoding import jacobi_generate
from kdlib.objectives import CrossEntropy
from tests.integration.runs import SINGLE, TORCHRUN, Material, completed, distill, material, metrics, values
from tests.tiny import tiny_llama
from tests.trainers.jacobi_plain import trajectories
from tests.trainers.jacobi_steps import jacobi_trainer
from tests.trainers.small import V, trainer_of

COMMON = ["--block_size", "4", "--evaluate.limit", "0", "--logging_steps", "1", "--learning_rate", "1e-3"]
SPLITS = {
    "at_once": (SINGLE, ["--per_device_train_batch_size", "8"]),
    "accumulated": (SINGLE, ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]),
    "two_processes": (TORCHRUN, ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"]),
}
COMPARED = ("loss", "grad_norm", "ar/cross_entropy", "scored_tokens", "eval_loss", "eval_ar/cross_entropy")
STORED = ["--states_per_block", "2", "--blocks_per_row", "2"]
SOURCES = {"stored": STORED, "student": ["--init", "random"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return material(tmp_path_factory.mktemp("material"), rows=20, held_out=11)


def stored(directory: Path, name: str, *, count: int) -> str:
    """Rows with trajectories of unequal lengths."""
    rows = trajectories(seed=count, lengths=[3 + 5 * i % 14 for i in range(count)], states=4)
    path = directory / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row.row()) + "\n" for row in rows))
    return str(path)


def words_of(directory: Path, files: Material, source: str) -> list[str]:
    train, held_out = files.train, files.held_out
    if source == "stored":
        train, held_out = (stored(directory, name, count=count) for name, count in (("train", 20), ("held_out", 11)))
    names = ["--model", files.student, "--dataset_name", train, "--eval_dataset_name", held_out]
    return [*names, "--state_source", source, *COMMON, *SOURCES[source]]


@pytest.mark.parametrize("source", list(SOURCES))
def test_how_a_step_is_split_does_not_matter(tmp_path: Path, files: Material, source: str) -> None:
    """20 rows in steps of 8 leave 4 for an epoch's last one, and 11 evaluation rows fit no batch size."""
    runs = {}
    for name, (launcher, shape) in SPLITS.items():
        words = [*words_of(tmp_path, files, source), *shape, "--max_steps", "4", "--save_strategy", "no"]
        runs[name] = completed(tmp_path / name, words, launcher=launcher, name="jacobi")
    for key in COMPARED:
        wanted = values(runs["at_once"], key)
        assert len(wanted) == (1 if key.startswith("eval") else 4), key
        for name in ("accumulated", "two_processes"):
            assert values(runs[name], key) == pytest.approx(wanted, rel=1e-5), (name, key)
    losses = values(runs["at_once"], "loss")
    assert losses[-1] < 0.98 * losses[0], "the runs must go somewhere to tell anything"


def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, files: Material) -> None:
    """Its random first guesses, the averaged teacher and the objective's state come back."""
    objective = str(Path(__file__).with_name("interrupted.py")) + ":InterruptedTAID"
    words = [*words_of(tmp_path, files, "student"), "--objective", objective, "--objective.t_start", "0.2"]
    words += ["--teacher", "{SelfTeacher: {kind: ema, decay: 0.9}}", "--per_device_train_batch_size", "2"]
    words += ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2"]
    whole = completed(tmp_path / "whole", words, name="jacobi")
    environment = {"INTERRUPT_SIGNAL": "SIGKILL", "INTERRUPT_STEP": "5"}
    killed = distill(tmp_path / "run", words, environment=environment, name="jacobi")
    assert killed.returncode == -signal.SIGKILL and not (tmp_path / "run" / "final").exists()
    again = distill(tmp_path / "run", words, name="jacobi")
    assert again.returncode == 0, again.stderr[-4000:]
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-4'}" in again.stderr
    for name in ("final/model.safetensors", "checkpoint-6/teacher_ema.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name
    assert metrics(tmp_path / "run") == metrics(whole)


# A task whose answers the prompt tells whole: the last token of the prompt names one of eight texts.

TEXT, PROMPT, BLOCK = 32, 5, 16


def predictable(count: int, *, seed: int) -> list[dict[str, Any]]:
    rng, texts = random.Random(seed), random.Random(0)
    known = [[texts.randrange(11, V) for _ in range(TEXT - 1)] + [2] for _ in range(8)]
    rows = []
    for _ in range(count):
        which = rng.randrange(8)
        prompt = [1, *(rng.randrange(11, V) for _ in range(PROMPT - 2)), 3 + which]
        ids, labels = prompt + known[which], [-100] * PROMPT + known[which]
        rows.append({"input_ids": ids, "labels": labels, "sample_id": sample_id(ids, labels)})
    return rows


def decoded(model: Any, rows: list[dict[str, Any]]) -> float:
    """Tokens per forward, of texts that are the model's greedy ones."""
    ids = torch.tensor([row["input_ids"][:PROMPT] for row in rows])
    found = jacobi_generate(model.eval(), ids, max_new_tokens=TEXT, block_size=BLOCK)
    how = {"max_new_tokens": TEXT, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, attention_mask=torch.ones_like(ids), **how)
    for tokens, wanted, length in zip(found.sequences.tolist(), greedy.tolist(), found.lengths.tolist(), strict=True):
        assert tokens[: PROMPT + length] == wanted[: PROMPT + length]
    return float(found.tokens_per_forward)


def test_training_gives_more_tokens_per_forward_and_the_same_as_greedy_decoding(tmp_path: Path) -> None:
    rows, held_out = Dataset.from_list(predictable(256, seed=1)), predictable(16, seed=2)
    model = tiny_llama(V, hidden=64, initializer_range=0.05)
    learning = {"learning_rate": 5e-3, "logging_steps": 50}
    config = {**learning, "max_steps": 120, "per_device_train_batch_size": 16}
    trainer_of(tmp_path / "base", rows=rows, model=model, teacher=None, objective=CrossEntropy(), config=config).train()
    before = decoded(model, held_out)
    assert before < 1.1, "a model that was not trained for it gives little more than one"
    student = copy.deepcopy(model)
    config = {**learning, "max_steps": 100, "per_device_train_batch_size": 8, "block_size": BLOCK, "max_grad_norm": 1.0}
    jacobi_trainer(tmp_path / "jacobi", rows, model=student, config=config).train()
    assert decoded(student, held_out) >= 1.1 * before

"""Runs of the real ``kdlib distill`` command in processes of their own, and what they leave behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel

from tests.tiny import tiny_llama, tiny_tokenizer

SINGLE = ("-m",)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")
PATIENCE = 180.0  # seconds: a run takes about ten
CLOCK = {"tokens_per_second", "time/teacher", "time/update", "time/data"}


@dataclass(frozen=True, kw_only=True)
class Material:
    """Files that the runs of a test module share."""

    student: str
    teacher: str
    train: str
    held_out: str

    @property
    def words(self) -> list[str]:
        return ["--model", self.student, "--teacher", self.teacher, "--dataset_name", self.train]


def material(directory: Path, *, rows: int, held_out: int, **student: Any) -> Material:
    """A tiny student and teacher, and rows of unequal length; ``student`` goes to its configuration."""
    return Material(
        student=_saved(directory / "student", tiny_llama(len(tiny_tokenizer()), **student)),
        teacher=_saved(directory / "teacher", tiny_llama(len(tiny_tokenizer()), seed=1)),
        train=_rows(directory / "train.jsonl", count=rows, start=0),
        held_out=_rows(directory / "held_out.jsonl", count=held_out, start=100),
    )


def _saved(directory: Path, model: PreTrainedModel) -> str:
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return str(directory)


def _rows(path: Path, *, count: int, start: int) -> str:
    texts = [f"{'two plus ' * (1 + 5 * i % 7)}{i} is four, because the sky is blue." for i in range(start, start + count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def distill(
    output: Path,
    words: list[str],
    *,
    launcher: tuple[str, ...] = SINGLE,
    environment: dict[str, str] | None = None,
    name: str = "distill",
) -> subprocess.CompletedProcess[str]:
    """``kdlib NAME WORDS --output_dir OUTPUT`` on CPU, one thread per process."""
    command = [
        sys.executable,
        *launcher,
        "kdlib",
        name,
        *words,
        "--output_dir",
        str(output),
        "--use_cpu",
        "true",
    ]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **(environment or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True, env=variables, start_new_session=True) as process:
        try:
            out, err = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def completed(output: Path, words: list[str], **how: Any) -> Path:
    """The directory of a run that must end well."""
    done = distill(output, words, **how)
    assert done.returncode == 0, done.stderr[-4000:]
    return output


def metrics(output: Path) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in line.items() if key not in CLOCK and not _timed(key)} for line in lines]


def _timed(key: str) -> bool:
    return key.endswith(("_runtime", "_per_second", "_preparation_time"))


def values(output: Path, key: str) -> list[float]:
    """One key over the lines that have it."""
    return [line[key] for line in metrics(output) if key in line]


def alone_and_by_two(directory: Path, words: list[str], *, compared: Sequence[str]) -> Path:
    """The directory of a run of three steps of 8 rows, after the same run by two processes has logged the same."""
    one = completed(directory / "one", [*words, "--per_device_train_batch_size", "8"], launcher=SINGLE)
    shape = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "2"]
    two = completed(directory / "two", [*words, *shape], launcher=TORCHRUN)
    assert values(two, "scored_tokens") == values(one, "scored_tokens")
    for key in compared:
        wanted = values(one, key)
        assert len(wanted) == (1 if key.startswith("eval") else 3), key
        assert values(two, key) == pytest.approx(wanted, rel=1e-5, abs=1e-6), key
    return one


def whole_and_killed(directory: Path, words: list[str], *, files: Sequence[str]) -> tuple[Path, Path]:
    """The directories of a run of six steps in batches of 2 x 2, and of one that was killed in step 5 and went on.

    ``files`` of both are the same to the byte.
    """
    words = [*words, "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"]
    words += ["--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2"]
    whole, cut = completed(directory / "whole", words), directory / "run"
    killed = distill(cut, words, environment={"INTERRUPT_SIGNAL": "SIGKILL", "INTERRUPT_STEP": "5"})
    assert killed.returncode == -signal.SIGKILL and not (cut / "final").exists()
    again = distill(cut, words)
    assert again.returncode == 0, again.stderr[-4000:]
    assert f"resuming from {cut / 'checkpoint-4'}" in again.stderr
    for name in files:
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name
    return whole, cut

"""How long a run will take: a few steps of the real command in a directory that is deleted again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kdlib.cli.planning.disk import checkpoints, evaluations

WARM_UP, STEPS = 3, 3  # steps before those that are timed, and these
LOAD = {"logging_steps": STEPS, "logging_first_step": True, "logging_strategy": "steps", "report_to": "none", "tasks": None}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the short run showed: seconds, tokens of a timed step, and the most memory that its process held (Linux)."""

    wall: float
    step: float
    tokens: float
    checkpoint: float
    evaluation: float
    memory: int


def measured(command: str, config: Mapping[str, Any]) -> Measured:
    """The command with these options, for a few steps; ValueError with its last line when it fails."""
    with tempfile.TemporaryDirectory(prefix="kdlib-plan-") as root:
        out, file = Path(root) / "run", Path(root) / "config.yaml"
        file.write_text(yaml.safe_dump(_short(config, out), sort_keys=False))
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, "-m", "kdlib", command, "--config", str(file)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)  # which says what this process alone has held
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = (said.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"the steps to be timed failed: {last}")
        wall = time.perf_counter() - start
        return Measured(wall=wall, **_timed(out), checkpoint=_writing(out), memory=usage.ru_maxrss * 1024)


def _short(config: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The options of the short run: one checkpoint, and one evaluation where there are rows for it."""
    steps = WARM_UP + STEPS
    evaluates = config["eval_dataset_name"] or config["dataset_test_split"]
    evaluation = {"eval_strategy": "steps", "eval_steps": steps} if evaluates else {}
    short = {"output_dir": str(out), "max_steps": steps, "save_strategy": "steps", "save_steps": steps}
    return {**config, **LOAD, **short, **evaluation, "load_best_model_at_end": False, "push_to_hub": False}


def _timed(out: Path) -> dict[str, float]:
    """Seconds and tokens of a step between the last two log lines, and seconds of the evaluation."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "tokens_per_second" in line]
    tokens = logged[-1]["seen_tokens"] - logged[-2]["seen_tokens"]
    seconds = tokens / logged[-1]["tokens_per_second"]
    runtimes = [line["eval_runtime"] for line in lines if "eval_runtime" in line]
    count = logged[-1]["step"] - logged[-2]["step"]
    return {"step": seconds / count, "tokens": tokens / count, "evaluation": max(runtimes, default=0.0)}


def _writing(out: Path) -> float:
    """Seconds between the first and the last file of the checkpoint."""
    times = [file.stat().st_mtime for file in out.glob("checkpoint-*/*")]
    return max(times) - min(times)


def time_plan(found: Measured, plan: Mapping[str, Any], args: Any) -> dict[str, Any]:
    """Seconds of the whole run and of its parts.

    A step takes the time of one with as many tokens as the data have on average; what comes before the first and after the
    last step, is as long as in the short run. Scores by lm-eval (``tasks``) are not in it.
    """
    steps = plan["optimizer_steps"]
    usual = found.tokens if args.on_policy_fraction else plan["tokens_per_epoch"] / plan["steps_per_epoch"]
    step = found.step * usual / found.tokens
    around = max(0.0, found.wall - (WARM_UP + STEPS) * found.step - found.checkpoint - found.evaluation)
    parts = {
        "start and end": around,
        "training": steps * step,
        "checkpoints": checkpoints(args, steps=steps) * found.checkpoint,
        "evaluations": evaluations(args, steps=steps) * found.evaluation,
    }
    return {
        "seconds": sum(parts.values()),
        "seconds_per_step": step,
        "tokens_per_second": found.tokens / found.step,
        "steps_measured": STEPS,
        "parts": {name: value for name, value in parts.items() if value},
        "memory_measured": found.memory,
    }

"""Diffusion models made from nothing: an auto-regressive model, the diffusion model that it becomes, and its own answers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training import trained, typed

from kdlib.cli.demo_data import settings, write_data
from kdlib.data.arithmetic import make_problems

ROOT = Path(__file__).resolve().parents[1]
MASK = "<|mask|>"
ROWS, RESPONSE, BLOCK = 20000, 32, 32  # answers of the demo's task have at most 30 tokens
ADAPTATION: dict[str, Any] = {
    "objective": {"MaskedELBO": {"weighting": "uniform"}},
    "mask_token": MASK,
    "shift": True,
    "response_length": RESPONSE,
    "block_length": BLOCK,
    "max_length": 128,
    "learning_rate": 2e-3,
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 32,
    "logging_steps": 50,
    "save_strategy": "no",
    "evaluate.limit": 0,
}


def diffusion_teacher(root: Path, *, seed: int, steps: int, quick: bool) -> Path:
    """The demo's task learnt token by token, then by masks: a diffusion model of 0.7M parameters made from nothing."""
    rows = root / "solutions.jsonl"
    if not rows.is_file():
        write_data(root, seed=seed, quick=quick)
        problems = make_problems(64 if quick else ROWS, seed=seed, split="train")
        rows.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    blank = {"model": root / "blank-teacher", "dataset_name": rows, "objective": "CrossEntropy", "seed": seed}
    causal = trained("distill", root / "causal", **blank, **settings("teacher", quick=quick))
    given = {"model": causal, "dataset_name": rows, "seed": seed, "max_steps": 2 if quick else steps}
    return trained("diffusion", root / "teacher", **given, **ADAPTATION)


def write_trajectories(teacher: Path, rows: Path, output: Path, *, limit: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """The teacher's own answers, one token in each pass, of which a verifier keeps the right ones; what index.json says."""
    given = {"model": teacher, "dataset_name": rows, "limit": limit, "output_dir": output, "device": "cpu", **options}
    call = [sys.executable, "-m", "kdlib", "trajectories", "diffusion", *typed(given)]
    subprocess.run(call, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    summary: dict[str, Any] = json.loads((output / "index.json").read_text())["summary"]
    return summary

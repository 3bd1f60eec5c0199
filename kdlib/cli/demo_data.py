"""The demo's rows, blank models, lm-eval task and training options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from kdlib.data.arithmetic import Split, make_problems
from kdlib.data.arithmetic_models import make_model, make_tokenizer
from kdlib.eval.arithmetic_task import TASK, arithmetic_task

# The teacher sees many problems once, the students the first few of them many times. One calculation in four is wrong in the
# training rows, as in text that people write; the test answers are right.
ROWS = {"teacher_train": 20000, "train": 500, "test": 400}
SLIPS = 0.25
STEPS = {"teacher": 800, "student": 800}
COMMON = {"max_length": 128, "warmup_steps": 0.05, "logging_steps": 20}
OPTIONS = {
    "teacher": {"learning_rate": 3e-3, "per_device_train_batch_size": 32},
    "student": {"learning_rate": 5e-3, "per_device_train_batch_size": 16},
}
QUICK_ROWS, QUICK_STEPS = 64, 4


def write_data(root: Path, *, seed: int, quick: bool) -> None:
    """teacher_train.jsonl, train.jsonl (its first rows), test.jsonl, blank-teacher/, student/ and tasks/."""
    root.mkdir(parents=True, exist_ok=True)
    for name, count in ROWS.items():
        split: Split = "test" if name == "test" else "train"
        problems = make_problems(
            min(count, QUICK_ROWS) if quick else count, seed=seed, split=split, slips=0.0 if split == "test" else SLIPS
        )
        (root / f"{name}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    tokenizer = make_tokenizer()
    make_model("teacher", tokenizer, seed=seed).save_pretrained(root / "blank-teacher")
    make_model("student", tokenizer, seed=seed).save_pretrained(root / "student")
    for folder in ("blank-teacher", "student"):
        tokenizer.save_pretrained(root / folder)
    (root / "tasks").mkdir(exist_ok=True)
    (root / "tasks" / f"{TASK}.yaml").write_text(yaml.safe_dump(arithmetic_task(root / "test.jsonl"), sort_keys=False))


def settings(kind: str, *, quick: bool) -> dict[str, Any]:
    """The training options of the teacher or of both students."""
    steps = QUICK_STEPS if quick else STEPS[kind]
    return {**COMMON, **OPTIONS[kind], "max_steps": steps, "save_strategy": "steps", "save_steps": max(2, steps // 3)}

"""Teacher hacking on the demo's task: does the alarm fire on a run that is built to hack, and stay quiet on a healthy one?

python benchmarks/hacking.py --seeds 0 1 2 --output docs/results/hacking.md
--quick runs one seed for a few steps, to see that the script works.

For every seed: the demo's teacher, trained on worked solutions of which one calculation in four is wrong, so that it is a
noisy copy of what one wants. A student is distilled from it in three ways from the same start: on a few of the teacher's own
answers, fixed, word by word, for many epochs; on text of which it sees no row twice; and on its own fresh answers. The golden
metric is what the right solutions of problems that no model has seen cost the student. Finished runs are left alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table
from training import trained, typed

from kdlib.cli.demo_data import settings, write_data
from kdlib.data.arithmetic import make_problems
from kdlib.eval.report import read_metrics, series

FIXED = 64  # answers of the teacher that the hacking run sees again and again
GOLDEN = 200
HACKING = "64 fixed answers of the teacher, many epochs"
RUNS: dict[str, dict[str, Any]] = {
    HACKING: {"objective": "CrossEntropy", "teacher": None},
    "fresh text": {"objective": "ForwardKL"},
    "fresh answers of the student": {"objective": "ForwardKL", "on_policy_fraction": 1.0, "max_completion_length": 64},
}
HEAD = ["seed", "run", "alarm at step", "best golden (step)", "golden at the end", "training loss, first and last quarter"]


def one_seed(root: Path, *, seed: int, quick: bool, steps: int) -> list[list[str]]:
    """A row of the table for each run."""
    if not (root / "student").is_dir():
        write_data(root, seed=seed, quick=quick)
    blank = {"model": root / "blank-teacher", "dataset_name": root / "teacher_train.jsonl", "objective": "CrossEntropy"}
    teacher = trained("distill", root / "teacher", **blank, seed=seed, **settings("teacher", quick=quick))
    answers = own_answers(teacher, root, count=4 if quick else FIXED)
    golden = right_solutions(root, seed=seed, count=8 if quick else GOLDEN)
    every = 1 if quick else steps // 20
    common = {
        "model": root / "student",
        "teacher": teacher,
        "seed": seed,
        **settings("student", quick=quick),
        "max_steps": steps,
        "lr_scheduler_type": "constant_with_warmup",
        "logging_steps": max(1, every // 5),
        "golden_dataset_name": golden,
        "eval_dataset_name": golden,
        "eval_strategy": "steps",
        "eval_steps": every,
        "save_strategy": "no",
    }
    rows = []
    for name, options in RUNS.items():
        data = answers if name == HACKING else root / "teacher_train.jsonl"
        given = {**common, **options, "dataset_name": data}
        final = trained("distill", root / name.replace(" ", "-").replace(",", ""), **given)
        rows.append([str(seed), name, *outcome(final.parent)])
    return rows


def own_answers(teacher: Path, root: Path, *, count: int) -> Path:
    """The teacher's answers to the first training questions, one each."""
    asked, traces = root / "asked.jsonl", root / "traces"
    if (traces / "report.json").is_file():
        return traces / "shard-00000.jsonl"
    lines = (root / "train.jsonl").read_text().splitlines(keepends=True)
    asked.write_text("".join(lines[:count]))
    options = {"model": teacher, "dataset_name": asked, "num_generations": 1, "max_completion_length": 64, "device": "cpu"}
    call = [sys.executable, "-m", "kdlib", "generate", *typed({**options, "output_dir": traces})]
    subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
    return traces / "shard-00000.jsonl"


def right_solutions(root: Path, *, seed: int, count: int) -> Path:
    """Problems of the test split with solutions that are right throughout."""
    path = root / "golden.jsonl"
    problems = make_problems(count, seed=seed, split="test", slips=0.0)
    path.write_text("".join(json.dumps({"messages": problem["messages"]}) + "\n" for problem in problems))
    return path


def outcome(run: Path) -> list[str]:
    """When the alarm fired, the golden metric, and the training loss of a run."""
    metrics = read_metrics(run / "metrics.jsonl")
    steps, values = series(metrics, "golden/value")
    alarms = [step for step, value in zip(*series(metrics, "golden/alarm"), strict=True) if value]
    best = min(range(len(values)), key=values.__getitem__)
    losses = series(metrics, "loss")[1]
    quarter = max(1, len(losses) // 4)
    first, last = (sum(part) / len(part) for part in (losses[:quarter], losses[-quarter:]))
    fired = f"{alarms[0]:.0f}" if alarms else "none"
    return [fired, f"{values[best]:.4f} ({steps[best]:.0f})", f"{values[-1]:.4f}", f"{first:.4f}, {last:.4f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", default="runs/hacking", help="where runs are kept; finished ones are not run again")
    parser.add_argument("--output", help="write the table as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed")
    arguments = parser.parse_args()
    seeds, steps = (arguments.seeds[:1], 4) if arguments.quick else (arguments.seeds, arguments.steps)
    root = Path(arguments.runs).resolve()
    lines = [line for seed in seeds for line in one_seed(root / str(seed), seed=seed, quick=arguments.quick, steps=steps)]
    shown = Table(*HEAD)
    for line in lines:
        shown.add_row(*line)
    Console(width=180).print(shown)
    said = verdict(lines)
    print(said)
    if arguments.output:
        write_results(
            arguments.output,
            title="Teacher hacking on the demo's task",
            parts=[*parts(steps), markdown_table(HEAD, lines), said],
        )


def verdict(lines: list[list[str]]) -> str:
    """How often the alarm was right."""
    hacking = [line for line in lines if line[1] == HACKING]
    healthy = [line for line in lines if line[1] != HACKING]
    fired, quiet = sum(line[2] != "none" for line in hacking), sum(line[2] == "none" for line in healthy)
    return (
        f"The alarm fired on {fired} of {len(hacking)} runs built to hack, and was quiet on {quiet} of {len(healthy)} others."
    )


def parts(steps: int) -> list[str]:
    return [
        f"Every run: {steps} steps from the same untrained student, learning rate constant after warmup, 20 evaluations. "
        f"Golden: nats per byte of the right solutions of {GOLDEN} problems that no model has seen. The teacher was trained on "
        "solutions of which one calculation in four is wrong, and makes such mistakes itself when it is sampled from.",
    ]


if __name__ == "__main__":
    main()

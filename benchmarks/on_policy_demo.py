"""On-policy against off-policy distillation on the demo's task, at equal student tokens.

python benchmarks/on_policy_demo.py --seeds 0 1 2 3 4 --output docs/results/on_policy_demo.md
--quick runs one seed for a few steps, to see that the script works.

For every seed: the demo's teacher; a student distilled off-policy for a while; then, from that same student, rounds of further
training that differ in where the completions come from. The off-policy round runs last, for as many steps as reach the scored
tokens of the longest other one.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table
from training import trained

from kdlib.cli.demo_data import settings, write_data
from kdlib.cli.env import machine_line
from kdlib.data.arithmetic import make_problems
from kdlib.eval import evaluate
from kdlib.eval.arithmetic_task import TASK
from kdlib.eval.results import summary_rows
from kdlib.files import write_whole

START_STEPS, STEPS, LEARNING_RATE = 400, 800, 2e-3
ROLLOUT = {"on_policy_fraction": 1.0, "max_completion_length": 96}
FURTHER: dict[str, dict[str, Any]] = {
    "on-policy, forward KL": {"objective": "ForwardKL", **ROLLOUT},
    "on-policy, reverse KL": {"objective": "ReverseKL", **ROLLOUT},
    "mixed 1:1, forward KL": {"objective": "ForwardKL", **ROLLOUT, "on_policy_fraction": 0.5},
    "teacher's own answers, forward KL": {"objective": "ForwardKL", **ROLLOUT, "rollout_source": "teacher"},
}
BASELINE = "off-policy, forward KL"
FAULTLESS = "off-policy, forward KL, rows without slips"


def scored_tokens(run: Path) -> int:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return int(max(line["scored_tokens"] for line in lines if "scored_tokens" in line))


def tokens_per_step(run: Path, *, batch: int) -> float:
    """Scored tokens of an off-policy step, on average over an epoch."""
    plan = json.loads((run / "plan.json").read_text())
    return float(plan["scored_tokens_per_epoch"]) / math.ceil(plan["rows"] / batch)


def accuracy(model: Path, root: Path, *, limit: int | None) -> float:
    found = evaluate(str(model), TASK, include_path=str(root / "tasks"), batch_size=200, device="cpu", limit=limit)
    return float(summary_rows(found)[0]["value"])


def one_seed(root: Path, *, seed: int, quick: bool) -> dict[str, tuple[float, int]]:
    """{round: (accuracy, scored student tokens of the round)}."""
    if not (root / "student").is_dir():
        write_data(root, seed=seed, quick=quick)
    common = {"seed": seed, **settings("student", quick=quick), "learning_rate": LEARNING_RATE, "logging_steps": 1}
    common["max_steps"] = 2 if quick else STEPS
    blank = {"model": root / "blank-teacher", "dataset_name": root / "teacher_train.jsonl", "objective": "CrossEntropy"}
    teacher = trained("distill", root / "teacher", **blank, seed=seed, **settings("teacher", quick=quick))
    rows = {"teacher": teacher, "dataset_name": root / "train.jsonl"}
    start = trained(
        "distill",
        root / "start",
        model=root / "student",
        objective="ForwardKL",
        **rows,
        **{**common, **settings("student", quick=quick), "max_steps": 2 if quick else START_STEPS},
    )
    limit = 8 if quick else None
    found = {"teacher": (accuracy(teacher, root, limit=limit), 0), "start": (accuracy(start, root, limit=limit), 0)}
    for name, options in FURTHER.items():
        run = root / name.replace(" ", "_").replace(",", "").replace(":", "-").replace("'", "")
        final = trained("distill", run, model=start, **rows, **common, **options)
        found[name] = (accuracy(final, root, limit=limit), scored_tokens(run))
    budget = max(found[name][1] for name in FURTHER)
    common["max_steps"] = math.ceil(
        1.01 * budget / tokens_per_step(root / "start", batch=common["per_device_train_batch_size"])
    )
    for name, data in ((BASELINE, root / "train.jsonl"), (FAULTLESS, faultless(root, seed=seed))):
        run = root / ("off-policy" if name == BASELINE else "off-policy-faultless")
        final = trained("distill", run, model=start, **{**rows, "dataset_name": data}, **common, objective="ForwardKL")
        found[name] = (accuracy(final, root, limit=limit), scored_tokens(run))
    return found


def faultless(root: Path, *, seed: int) -> Path:
    """The training problems with right solutions throughout."""
    path = root / "faultless.jsonl"
    count = len((root / "train.jsonl").read_text().splitlines())
    rows = make_problems(count, seed=seed, split="train", slips=0.0)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(found: list[dict[str, tuple[float, int]]], seeds: list[int]) -> tuple[list[str], list[list[str]]]:
    head = ["", *(f"seed {seed}" for seed in seeds), "mean", "scored tokens", "better than off-policy"]
    lines = []
    for name in found[0]:
        values, tokens = [of[name][0] for of in found], mean(of[name][1] for of in found)
        wins = sum(of[name][0] > of[BASELINE][0] for of in found)
        told = "" if name in (BASELINE, "teacher", "start") else f"{wins} of {len(found)}"
        lines.append([name, *(f"{v:.3f}" for v in values), f"{mean(values):.3f}", f"{tokens:,.0f}", told])
    return head, lines


def report(head: list[str], lines: list[list[str]], seeds: list[int]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join(
        [
            "# On-policy against off-policy on the demo's task",
            "",
            f"Command: `python benchmarks/on_policy_demo.py --seeds {' '.join(map(str, seeds))}`",
            "",
            f"Accuracy on 400 problems that none has seen. `start` is a student after {START_STEPS} off-policy steps; each",
            f"round goes on from it for {STEPS} steps (learning rate {LEARNING_RATE}), the off-policy one until it has scored",
            "as many tokens as the longest of the others. The demo's training rows hold slips (one calculation in four is",
            "wrong); the teacher's answers and the student's own do not come from these rows. The last line trains on",
            "as many problems with right solutions, which no other student saw.",
            "",
            "| " + " | ".join(head) + " |",
            "|---|" + "---:|" * (len(head) - 1),
            *rows,
            "",
            machine_line(),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--runs", default="runs/on-policy-demo", help="where runs are kept; finished ones are not run again")
    parser.add_argument("--output", help="write the table as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed")
    arguments = parser.parse_args()
    seeds = arguments.seeds[:1] if arguments.quick else arguments.seeds
    found = [one_seed(Path(arguments.runs) / str(seed), seed=seed, quick=arguments.quick) for seed in seeds]
    head, lines = table(found, seeds)
    shown = Table(*head)
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)
    if arguments.output:
        write_whole(arguments.output, report(head, lines, seeds))


if __name__ == "__main__":
    main()

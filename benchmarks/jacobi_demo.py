"""Accuracy and tokens per forward pass on the demo's task, before and after consistency training.

python benchmarks/jacobi_demo.py --seeds 0 1 2 --output docs/results/jacobi_demo.md
--quick runs one seed for a few steps, to see that the script works.

For every seed: the demo's teacher, which is the model here; its own greedy answers to training questions with their Jacobi
states; then each method trains it on them, all until they have read equally many tokens. lm-eval scores each model twice, by
greedy and by Jacobi decoding. Finished runs are left alone: delete them in --runs after changing options here.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from jacobi_runs import ANCHORED, BLOCK, METHODS, PLAIN, seen_tokens, trained_at_equal_tokens, write_trajectories
from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table
from training import trained

from kdlib.cli.demo_data import settings, write_data
from kdlib.eval import evaluate, summary_rows
from kdlib.eval.arithmetic_task import TASK

TOKENS_PER_FORWARD, POINTS = 2.0, 1.0  # the aims
NEW_TOKENS = 48  # as the task
COMMON: dict[str, Any] = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 32,
    "ar_labels": "trajectory",  # the data set's own answers have slips
    "ar_weight": 10.0,
    "max_length": 128,
}
BASE = "before training"
Score = dict[str, float]


def score(model: Path, root: Path, *, limit: int | None) -> Score:
    """Accuracy by both ways of decoding, and tokens per forward of the one in blocks."""
    fixed = {"include_path": str(root / "tasks"), "batch_size": 50, "device": "cpu", "limit": limit}
    greedy = evaluate(str(model), TASK, **fixed)
    blocks = evaluate(str(model), TASK, decoder={"block_size": BLOCK}, **fixed)
    accuracy, same = (float(summary_rows(found)[0]["value"]) for found in (greedy, blocks))
    return {"greedy": accuracy, "jacobi": same, "tokens_per_forward": float(blocks["tokens_per_forward"])}


def one_seed(root: Path, arguments: argparse.Namespace, *, seed: int) -> dict[str, Score]:
    """{method: scores}, the model before training first."""
    quick = arguments.quick
    if not (root / "tasks").is_dir():
        write_data(root, seed=seed, quick=quick)
    rows = root / "teacher_train.jsonl"
    blank = {"model": root / "blank-teacher", "dataset_name": rows, "objective": "CrossEntropy", "seed": seed}
    model = trained("distill", root / "teacher", **blank, **settings("teacher", quick=quick))
    states = root / f"trajectories-{arguments.rows}"
    write_trajectories(rows, states, model=model, limit=arguments.rows, longest=NEW_TOKENS)
    common = {**COMMON, "model": str(model), "dataset_name": str(states)}
    finals = trained_at_equal_tokens(root, arguments.methods, common=common, steps=arguments.steps, seed=seed)
    limit = 8 if quick else None
    found = {BASE: score(model, root, limit=limit) | {"tokens": 0}}
    for name, final in finals.items():
        found[name] = score(final, root, limit=limit) | {"tokens": seen_tokens(final)}
    return found


def means(found: list[dict[str, Score]]) -> dict[str, Score]:
    """Of every method over seeds, with ``points``, the change in greedy accuracy, and ``equal``, both ways agreeing."""
    summary = {}
    for name in found[0]:
        scores = [of[name] for of in found]
        summary[name] = {key: mean(one[key] for one in scores) for key in scores[0]}
        summary[name]["points"] = 100 * mean(of[name]["greedy"] - of[BASE]["greedy"] for of in found)
        summary[name]["equal"] = sum(one["greedy"] == one["jacobi"] for one in scores)
    return summary


def table(found: list[dict[str, Score]], seeds: list[int]) -> tuple[list[str], list[list[str]]]:
    head = ["model", *(f"seed {seed}" for seed in seeds), "accuracy", "change, points", "Jacobi = greedy"]
    lines = []
    for name, of in means(found).items():
        each = [f"{one[name]['greedy']:.3f} ({one[name]['tokens_per_forward']:.2f})" for one in found]
        agree = f"{of['equal']:.0f} of {len(found)}"
        points = "" if name == BASE else f"{of['points']:+.2f}"
        ratio = f"{of['tokens_per_forward']:.2f}"
        lines.append([name, *each, f"{of['greedy']:.3f}", points, agree, ratio, f"{of['tokens']:,.0f}"])
    return [*head, "tokens per forward", "tokens read"], lines


def aims(summary: Mapping[str, Score]) -> list[str]:
    """Whether each method gives the tokens per forward at the accuracy that was aimed at, on average over seeds."""
    said = [f"Aim: accuracy within {POINTS:g} point at {TOKENS_PER_FORWARD:g} tokens per forward or more."]
    for name, of in summary.items():
        kept = of["tokens_per_forward"] >= TOKENS_PER_FORWARD and of["points"] >= -POINTS
        line = f"- {name}: {of['tokens_per_forward']:.2f} tokens per forward, {of['points']:+.2f} points: "
        said += [] if name == BASE else [line + ("reached" if kept else "not reached")]
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=[PLAIN, ANCHORED], choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=450, help=f"of {PLAIN}")
    parser.add_argument("--rows", type=int, default=2000, help="training questions")
    parser.add_argument("--runs", default="runs/jacobi-demo", help="where models are kept")
    parser.add_argument("--output", help="write the table as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.rows = arguments.seeds[:1], 2, 16
        arguments.methods = ["Jacobi Forcing"]
    root = Path(arguments.runs).resolve()
    found = [one_seed(root / str(seed), arguments, seed=seed) for seed in arguments.seeds]
    head, lines = table(found, arguments.seeds)
    shown = Table(*head)
    for line in lines:
        shown.add_row(*line)
    Console(width=200).print(shown)
    said = "\n".join(aims(means(found)))
    print(said)
    if arguments.output:
        write_results(
            arguments.output,
            title="Jacobi decoding on the demo's task",
            parts=[*parts(arguments), markdown_table(head, lines), said],
        )


def parts(arguments: argparse.Namespace) -> list[str]:
    return [
        f"For each seed: accuracy by greedy decoding on problems that the model has not seen (400), in brackets the tokens per "
        f"forward of Jacobi decoding on them, block size {BLOCK}. Jacobi = greedy: seeds at which lm-eval gives both ways of "
        "decoding the same accuracy.",
        f"The model is the demo's teacher, trained on its own greedy answers to {arguments.rows:,} training questions. Options "
        f"of all: {COMMON}; {arguments.steps} steps of `{PLAIN}`, the others until they have read as many tokens of text and "
        "states.",
    ]


if __name__ == "__main__":
    main()

"""A diffusion model of the demo's arithmetic made from nothing, and its students: accuracy against forward passes.

python benchmarks/diffusion_demo.py --seeds 0 1 2 --output docs/results/diffusion_demo.md
--quick runs one seed for a few steps, to see that the script works.

For every seed: an auto-regressive model of worked solutions becomes a diffusion model (MaskedELBO); it answers training
questions, one token in each pass, and keeps the right answers; each method trains a student on them. lm-eval scores teacher and
students, decoded in several ways. Finished runs are left alone: delete them in --runs after changing options here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from diffusion_runs import BLOCK, RESPONSE, diffusion_teacher, write_trajectories
from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table
from training import trained

from kdlib.eval import evaluate, summary_rows
from kdlib.eval.arithmetic_task import TASK
from kdlib.eval.diffusion_aup import aup
from kdlib.files import write_whole

TEACHER, CERTAINTY = "teacher", "certainty forcing"
ONE_BY_ONE = {"LowConfidence": {"steps": RESPONSE}}
SWEEP: list[dict[str, Any]] = [
    ONE_BY_ONE,
    *({"ConfidenceThreshold": {"threshold": threshold}} for threshold in (0.99, 0.98, 0.95, 0.9, 0.8, 0.7, 0.5)),
]
METHODS: dict[str, dict[str, Any]] = {
    CERTAINTY: {"objective": "CertaintyForcing", "masking": "response"},
    "certainty forcing, any share masked": {"objective": "CertaintyForcing", "masking": "uniform"},
    "cross-entropy alone": {"objective": {"CertaintyForcing": {"weight": 0.0}}, "masking": "response"},
    "certainty forcing, d3LLM's masks": {"objective": "CertaintyForcing", "masking": "trajectory", "ratio_range": [0.0, 1.0]},
    "sharpened teacher (SPEED)": {"objective": {"SharpenedKL": {"temperature": 0.5}}, "masking": "uniform"},
}
COMMON: dict[str, Any] = {
    "learning_rate": 1e-3,
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 32,
    "response_length": RESPONSE,
    "block_length": BLOCK,
    "max_length": 128,
    "logging_steps": 20,
    "save_strategy": "no",
    "evaluate.limit": 0,
}
FEWER, POINTS = 3.0, 1.0  # the aims
Score = dict[str, Any]


def score(model: Path, root: Path, *, limit: int | None) -> list[Score]:
    """Accuracy and passes for every way of decoding; kept beside the model."""
    path = model.parent / f"scores-{limit}.json"
    if not path.is_file():
        write_whole(path, json.dumps([one_score(model, root, strategy, limit=limit) for strategy in SWEEP]))
    found: list[Score] = json.loads(path.read_text())
    return found


def one_score(model: Path, root: Path, strategy: Mapping[str, Any], *, limit: int | None) -> Score:
    found = evaluate(
        str(model),
        TASK,
        decoder={"strategy": strategy, "block_length": BLOCK},
        gen_kwargs={"max_gen_toks": RESPONSE},
        include_path=str(root / "tasks"),
        batch_size=100,
        device="cpu",
        limit=limit,
    )
    counted = found["config"]["decoder"]
    return {
        "strategy": strategy,
        "accuracy": float(summary_rows(found)[0]["value"]),
        "forwards": counted["forwards"] / counted["answers"],
        "tokens_per_forward": counted["tokens_per_forward"],
    }


def one_seed(root: Path, arguments: argparse.Namespace, *, seed: int) -> dict[str, list[Score]]:
    """{model: its scores}, the teacher first."""
    quick = arguments.quick
    teacher = diffusion_teacher(root, seed=seed, steps=arguments.teacher_steps, quick=quick)
    rows = root / f"trajectories-{arguments.rows}"
    keep = {"verify": "exact_number"} if not quick else {"keep": "all", "keep_unfinished": True}
    options = {"gen_length": RESPONSE, "block_length": BLOCK, "batch_size": 100, **keep}
    write_trajectories(teacher, root / "solutions.jsonl", rows, limit=arguments.rows, options=options)
    limit = 2 if quick else None
    found = {TEACHER: score(teacher, root, limit=limit)}
    common = {"model": teacher, "dataset_name": rows, "seed": seed, "max_steps": arguments.steps, **COMMON}
    for name in arguments.methods:
        output = root / "".join(c if c.isalnum() else "-" for c in name)
        found[name] = score(trained("diffusion", output, **common, **METHODS[name]), root, limit=limit)
    return found


def best(scores: Sequence[Score], *, floor: float) -> Score:
    """The fewest passes among the ways whose accuracy is at least ``floor``; the most accurate way where none is."""
    enough = [one for one in scores if one["accuracy"] >= floor]
    return min(enough, key=lambda one: one["forwards"]) if enough else max(scores, key=lambda one: one["accuracy"])


def summary(found: Sequence[Mapping[str, list[Score]]]) -> dict[str, dict[str, float]]:
    """Of every model over seeds: its best way within POINTS of the teacher's one token in each pass."""
    made = {}
    for name in found[0]:
        chosen = []
        for of in found:
            start = of[TEACHER][0]
            one = best(of[name], floor=start["accuracy"] - POINTS / 100)
            curve = [(s["tokens_per_forward"], 100 * s["accuracy"]) for s in of[name]]
            top = 100 * max(s["accuracy"] for scores in of.values() for s in scores)
            chosen.append(
                {
                    "accuracy": one["accuracy"],
                    "points": 100 * (one["accuracy"] - start["accuracy"]),
                    "forwards": one["forwards"],
                    "fewer": start["forwards"] / one["forwards"],
                    "aup": aup(curve, best=top),
                }
            )
        made[name] = {key: mean(one[key] for one in chosen) for key in chosen[0]}
    return made


def curves(found: Sequence[Mapping[str, list[Score]]]) -> tuple[list[str], list[list[str]]]:
    """Mean accuracy and passes over seeds, for every model and way of decoding."""
    head = ["decoding", *(f"{name}: accuracy (forwards)" for name in found[0])]
    lines = []
    for index, strategy in enumerate(SWEEP):
        ((name, options),) = strategy.items()
        cells = [f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"]
        for model in found[0]:
            accuracy, forwards = (mean(of[model][index][key] for of in found) for key in ("accuracy", "forwards"))
            cells.append(f"{accuracy:.3f} ({forwards:.2f})")
        lines.append(cells)
    return head, lines


def table(found: Sequence[Mapping[str, list[Score]]]) -> tuple[list[str], list[list[str]]]:
    head = ["model", "accuracy", "change, points", "forwards per answer", "times fewer", "AUP"]
    return head, [
        [
            name,
            f"{of['accuracy']:.3f}",
            f"{of['points']:+.2f}",
            f"{of['forwards']:.2f}",
            f"{of['fewer']:.2f}",
            f"{of['aup']:.1f}",
        ]
        for name, of in summary(found).items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--teacher_steps", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=1500, help="training questions that the teacher answers")
    parser.add_argument("--runs", default="runs/diffusion-demo", help="where models are kept")
    parser.add_argument("--output", help="write the table as Markdown to this file, and the plot beside it")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.steps, arguments.rows, arguments.methods = arguments.seeds[:1], 2, 4, [CERTAINTY]
        del SWEEP[2:]
    root = Path(arguments.runs).resolve()
    found = [one_seed(root / str(seed), arguments, seed=seed) for seed in arguments.seeds]
    for head, lines in (table(found), curves(found)):
        shown = Table(*head)
        for line in lines:
            shown.add_row(*line)
        Console(width=220).print(shown)
    if arguments.output:
        write_page(Path(arguments.output), found, arguments)


def write_page(path: Path, found: Sequence[Mapping[str, list[Score]]], arguments: argparse.Namespace) -> None:
    plot(path.with_suffix(".svg"), found)
    parts = [
        f"Each model's way of decoding with the fewest passes among those of at most {POINTS:g} point less accuracy than the "
        f"teacher's one token in each pass (the most accurate way where there is none), per seed, then means over seeds "
        f"{arguments.seeds}; 400 problems of the demo's task that no model has seen, on which the way is chosen, too. AUP: "
        f"d3LLM's, over all ways below. Aim: {FEWER:g} times fewer passes.",
        markdown_table(*table(found)),
        f"![accuracy against tokens per forward]({path.with_suffix('.svg').name})",
        "All ways, means over seeds:",
        markdown_table(*curves(found)),
        f"Teacher: {arguments.teacher_steps:,} steps of MaskedELBO on a causal model of the same rows. Students: "
        f"{arguments.steps:,} steps on the teacher's own answers to {arguments.rows:,} training questions, right ones alone. "
        f"Options of all: {COMMON}; of each: {METHODS}.",
        *(
            f"Seed {seed}, teacher, one token in each pass: {of[TEACHER][0]}"
            for seed, of in zip(arguments.seeds, found, strict=True)
        ),
    ]
    write_results(str(path), title="Diffusion models on the demo's task", parts=parts)


def plot(path: Path, found: Sequence[Mapping[str, list[Score]]]) -> None:
    """Mean accuracy over tokens per forward, a line for each model."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name in found[0]:
        points = [
            [mean(of[name][i][key] for of in found) for key in ("tokens_per_forward", "accuracy")] for i in range(len(SWEEP))
        ]
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    axes.set(xlabel="tokens per forward", ylabel="accuracy")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()

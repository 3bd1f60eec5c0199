"""The report of one run directory."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdlib.eval.page import Block, Code, Figure, Numbers, Section, Table, write_page
from kdlib.eval.plots import Points, line_plot, stacked_plot
from kdlib.eval.scores import headline_scores, score_blocks

Metrics = Sequence[Mapping[str, Any]]

# title, y axis with its unit, {name in the legend: key in metrics.jsonl}, caption
CURVES: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("Loss", "loss per scored token", {"train": "loss", "eval": "eval_loss"}, ""),
    (
        "Divergence from the teacher",
        "nats per scored token",
        {
            "forward KL(p‖q)": "kl_forward",
            "reverse KL(q‖p)": "kl_reverse",
            "forward KL, eval": "eval_kl_forward",
        },
        "p is the teacher, q the student.",
    ),
    ("Entropy", "nats per scored token", {"teacher": "entropy_teacher", "student": "entropy_student"}, ""),
    (
        "Top-1 agreement",
        "share of scored tokens",
        {"train": "top1_agreement", "eval": "eval_top1_agreement"},
        "How often both models prefer the same token.",
    ),
    (
        "Acceptance on these rows",
        "share of scored tokens",
        {"probabilistic draft": "acceptance", "greedy draft": "acceptance_greedy", "eval": "eval_acceptance"},
        "sum min(p, q) and p(argmax q) at temperature 1: what a target would keep if its text were these rows.",
    ),
    ("Throughput", "tokens per second", {"throughput": "tokens_per_second"}, ""),
    ("Learning rate", "learning rate", {"learning rate": "learning_rate"}, ""),
    ("Gradient norm", "gradient norm before clipping", {"gradient norm": "grad_norm"}, ""),
)
TASK_SCORE = re.compile("eval_.+/.+")  # eval_TASK/METRIC
FROM_ZERO = "Throughput"  # its changes mean something in proportion to its size
HEADLINE = {
    "Train loss": "loss",
    "Eval loss": "eval_loss",
    "Forward KL, nats": "kl_forward",
    "Top-1 agreement": "top1_agreement",
}


def write_report(run_dir: str | os.PathLike[str], *, extra_sections: Sequence[Section] = ()) -> Path:
    """Writes ``report.html`` into a run directory from the files that are there, and returns its path.

    Reads ``metrics.jsonl``, ``eval/*.json``, ``config.yaml``, ``environment.json`` and ``command.txt``; what
    is missing is not shown. ``extra_sections`` come after the evaluation. Raises ValueError when ``run_dir``
    is no directory.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise ValueError(f"no run directory at {str(run)!r}: give the output_dir of a run")
    metrics, scores = read_metrics(run / "metrics.jsonl"), _read_scores(run / "eval")
    steps = max((int(row["step"]) for row in metrics), default=0)
    return write_page(
        run / "report.html",
        title=run.resolve().name,
        lead=f"{steps:,} optimizer steps." if steps else "",
        headline=Numbers(items=_headline(metrics, scores)),
        sections=[
            Section(title="Training", blocks=_training_figures(metrics)),
            Section(title="Evaluation", blocks=score_blocks(scores)),
            *extra_sections,
            Section(title="Command", blocks=_code(run / "command.txt")),
            Section(title="Configuration", blocks=_code(run / "config.yaml")),
            Section(title="Environment", blocks=_environment(run / "environment.json")),
        ],
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, [] without the file; a last line that a killed run cut off is left out.

    Raises ValueError for any other line that is not JSON.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number} is not JSON: restore or delete that line") from None
    return rows


def series(metrics: Metrics, key: str) -> Points:
    """(steps, values) of ``key`` where it is finite; the last value of a step that was done again."""
    points = {row["step"]: row[key] for row in metrics if key in row and math.isfinite(row[key])}
    steps = sorted(points)
    return steps, [points[step] for step in steps]


def _read_scores(folder: Path) -> dict[str, dict[str, Any]]:
    """lm-eval's results by file name; JSON of another kind is passed over."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    return {name: content for name, content in found.items() if "results" in content}


def _training_figures(metrics: Metrics) -> list[Block]:
    figures: list[Block] = []
    for title, y, keys, caption in CURVES:
        curves = {name: points for name, key in keys.items() if (points := series(metrics, key))[0]}
        if curves:
            svg = line_plot(curves, y=y, from_zero=title == FROM_ZERO)
            figures.append(Figure(title=title, svg=svg, caption=caption))
    logged = sorted({key for row in metrics for key in row})
    tasks = {key.removeprefix("eval_"): series(metrics, key) for key in logged if TASK_SCORE.fullmatch(key)}
    if tasks:
        figures.append(Figure(title="Scores while training", svg=line_plot(tasks, y="score")))
    parts = [key for key in logged if key.startswith("time/")]
    timed = [row for row in metrics if all(part in row for part in parts)]
    if parts and timed:
        times = {part.removeprefix("time/"): series(timed, part) for part in parts}
        figures.append(Figure(title="Where the time goes", svg=stacked_plot(times, y="seconds per step")))
    return figures


def _headline(metrics: Metrics, scores: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Last values, the usual speed, and the score of the final (or first) model."""
    items = []
    for label, key in HEADLINE.items():
        values = series(metrics, key)[1]
        if values:
            items.append((label, f"{values[-1]:.3f}", f"from {values[0]:.3f}" if len(values) > 1 else ""))
    tokens, speeds = series(metrics, "scored_tokens")[1], series(metrics, "tokens_per_second")[1]
    if tokens:
        items.append(("Scored tokens", f"{tokens[-1]:,.0f}", "in all"))
    if speeds:
        items.append(("Tokens per second", f"{statistics.median(speeds):,.0f}", "median"))
    shown = "final" if "final" in scores else next(iter(scores), None)
    return items if shown is None else items + headline_scores({shown: scores[shown]})


def _code(path: Path) -> list[Block]:
    return [Code(text=path.read_text(encoding="utf-8").strip())] if path.is_file() else []


def _environment(path: Path) -> list[Block]:
    if not path.is_file():
        return []
    facts = json.loads(path.read_text(encoding="utf-8"))
    rows = [[key, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)] for key, value in facts.items()]
    return [Table(header=["what", "value"], rows=rows)]

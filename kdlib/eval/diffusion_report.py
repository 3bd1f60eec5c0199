"""A measurement of a diffusion language model as tables in the terminal and as one HTML page."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from kdlib.eval import page
from kdlib.eval.diffusion_counted import COUNTED
from kdlib.eval.diffusion_point import Point
from kdlib.eval.diffusion_result import DiffusionSweep
from kdlib.eval.plots import line_plot
from kdlib.eval.report_parts import interval_text, notes, terminal_table
from kdlib.eval.results import interval_text as score_text

HEADER = ("model", "strategy", "accuracy", "forwards per answer", "tokens per forward", "tokens per second", "fewer forwards")
CAPTION = (
    "tokens per forward: tokens before the end token / passes. fewer forwards: times less than one token per step. "
    "95% intervals over answers"
)


def task_rows(sweep: DiffusionSweep, task: str) -> list[list[str]]:
    """A row for every point of a task."""
    reference = sweep.reference(task)
    return [_cells(sweep, point, reference) for point in sweep.of(task)]


def _cells(sweep: DiffusionSweep, point: Point, reference: Point | None) -> list[str]:
    score = point.score(sweep.metric)
    fewer = "" if reference is None else interval_text(sweep.fewer_forwards(point, reference), 2)
    return [
        point.model,
        point.way,
        "" if score is None else score_text(score),
        interval_text(point.forwards_per_answer(**sweep.chance), 1),
        interval_text(point.tokens_per_forward(**sweep.chance), 2),
        f"{point.tokens_per_second:,.1f}",
        fewer,
    ]


def diffusion_tables(sweep: DiffusionSweep) -> list[RichTable]:
    """One for each task, for the terminal."""
    return [
        terminal_table(HEADER, task_rows(sweep, task), title=_title(sweep, task), left=2, caption=CAPTION)
        for task in sweep.tasks
    ]


def _title(sweep: DiffusionSweep, task: str) -> str:
    length, block = sweep.settings["gen_length"], sweep.settings["block_length"]
    return f"{task}, {len(sweep.of(task)[0].tokens)} answers, gen_length {length}, block_length {block}"


def diffusion_lines(sweep: DiffusionSweep) -> list[str]:
    """The area under every curve, each model's bits per byte, and where it was measured."""
    said = [
        f"{task}: AUP {area:.1f} of {model}, {family}"
        for task in sweep.tasks
        for (model, family), area in sweep.aup(task).items()
    ]
    said += [
        f"{model}: at most {bound.bits_per_byte:.4f} bits per byte, {bound.nats_per_token:.4f} nats per token "
        f"({bound.tokens:,} tokens of {bound.rows:,} rows, {bound.mc_samples} masks each)"
        for model, bound in sweep.bounds.items()
    ]
    machines = dict.fromkeys(point.machine for point in sweep.points)
    said += [f"tokens per second on {', '.join(machines)}, {sweep.settings['batch_size']} at a time"] if machines else []
    return said


def diffusion_sections(sweep: DiffusionSweep) -> list[page.Section]:
    """Plots, tables, findings, and what they count."""
    return [
        *(page.Section(title=task, blocks=_blocks(sweep, task)) for task in sweep.tasks),
        notes("Findings", diffusion_lines(sweep)),
        notes("What is counted", [f"{name}: {text}" for name, text in COUNTED.items()]),
    ]


def _blocks(sweep: DiffusionSweep, task: str) -> list[page.Block]:
    curves = sweep.curves(task)
    table = page.Table(header=HEADER, rows=task_rows(sweep, task), numeric=range(2, len(HEADER)), caption=CAPTION)
    if not curves:
        return [table]
    lines = {
        f"{model}, {family}": ([rho for rho, _ in points], [y for _, y in points]) for (model, family), points in curves.items()
    }
    plot = page.Figure(
        title="Accuracy over tokens per forward",
        svg=line_plot(lines, x="tokens per forward", y="accuracy, %"),
        caption="One token per step is the first point of a curve, where it was measured.",
    )
    return [plot, table]


def write_diffusion_page(path: str | os.PathLike[str], sweep: DiffusionSweep) -> Path:
    """The page of a measurement; returns its path."""
    settings = [[name, str(value)] for name, value in sweep.settings.items()]
    return page.write_page(
        path,
        title=f"Decoding of {Path(str(sweep.settings['model'])).name}",
        lead="What fewer forward passes cost in accuracy, by strategy of decoding.",
        headline=page.Numbers(items=_headline(sweep)),
        sections=[
            *diffusion_sections(sweep),
            page.Section(title="Settings", blocks=[page.Table(header=["option", "value"], rows=settings)]),
        ],
    )


def _headline(sweep: DiffusionSweep) -> list[tuple[str, str, str]]:
    """Of each task the point with most tokens per forward whose accuracy is at most a percentage point below the best."""
    found = []
    for task in sweep.tasks:
        accuracies: Mapping[int, Any] = {id(point): sweep.accuracy(point) or 0.0 for point in sweep.of(task)}
        best = max(accuracies.values())
        good = [point for point in sweep.of(task) if accuracies[id(point)] >= best - 1.0]
        chosen = max(good, key=lambda point: sum(point.tokens) / sum(point.forwards))
        value = chosen.tokens_per_forward(**sweep.chance).value
        found.append(
            (f"{task}: tokens per forward", f"{value:.2f}", f"{chosen.model}, {chosen.way}, within a point of the best")
        )
    return found

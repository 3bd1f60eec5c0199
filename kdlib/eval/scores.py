"""Scores of several models as blocks of a page: a table, bars with intervals, headline numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kdlib.eval.page import Block, Figure, Table
from kdlib.eval.plots import bar_plot
from kdlib.eval.results import by_metric, interval_text

Results = Mapping[str, Mapping[str, Any]]  # model name -> lm-eval's results
Facts = Mapping[str, str | int | float]  # label -> text or number


def score_blocks(results: Results, *, details: Mapping[str, Facts] | None = None, order: Sequence[str] = ()) -> list[Block]:
    """A table with a row per model (``details`` first, then its scores) and a bar plot per metric.

    ``order`` lists the models that keep one colour through all plots of the page. [] when there is nothing to
    show.
    """
    table = score_table(results, details=details or {})
    bars: list[Block] = []
    for (task, metric), cells in by_metric(results).items():
        rows = [{**row, "label": model} for model, row in cells.items()]
        bars.append(Figure(title=task, svg=bar_plot(rows, x=metric, order=order)))
    return [table, *bars] if len(table.header) > 1 else []


def score_table(results: Results, *, details: Mapping[str, Facts]) -> Table:
    """Models as rows; no best value is marked, because the intervals decide what differs."""
    metrics = by_metric(results)
    labels = list(dict.fromkeys(label for facts in details.values() for label in facts))
    header = ["model", *labels]
    for (task, metric), cells in metrics.items():
        counts = sorted({row["n"] for row in cells.values() if row["n"]})
        n = f" (n = {' / '.join(f'{count:,}' for count in counts)})" if counts else ""
        header.append(f"{task}, {metric}{n}")
    rows = []
    for name in results:
        facts = details.get(name, {})
        scores = [interval_text(cells[name]) if name in cells else "" for cells in metrics.values()]
        rows.append([name, *(number_text(facts.get(label, "")) for label in labels), *scores])
    caption = "Value ± 95% interval; n is the number scored." if metrics else ""
    return Table(header=header, rows=rows, numeric=range(1, len(header)), caption=caption)


def headline_scores(results: Results) -> list[tuple[str, str, str]]:
    """(model, value, what and 95% interval) of the first metric, for each model that has it."""
    items = []
    for (task, metric), cells in list(by_metric(results).items())[:1]:
        for name, row in cells.items():
            known = row["low"] is not None
            bounds = f", 95%: {max(row['low'], 0.0):.3f} to {row['high']:.3f}" if known else ""
            items.append((name, f"{row['value']:.3f}", f"{task}, {metric}{bounds}"))
    return items


def number_text(value: str | int | float) -> str:
    """Integers with thousands separators, other numbers to four digits, text as it is."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else value

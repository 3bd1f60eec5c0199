"""lm-eval's results dictionary: its rows, their intervals, a table of several models, and one JSON file per
call.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from scipy.stats import binomtest

from kdlib.files import write_whole

Z95 = 1.96
# Means of zeros and ones: when all are equal the standard error is 0; Wilson's interval still says something.
PROPORTIONS = ("acc", "exact_match", "em", "pass@", "avg@", "maj@", "truncated")
# What of several results is put together, each {task: ...}; of everything else the last one's is taken.
BY_TASK = (
    *("results", "groups", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples", "samples"),
    *("intervals", "per_problem", "sampled"),
)


def summary_rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row per task (or group), metric and filter of ``results``.

    Keys: ``task metric filter value stderr n higher_is_better low high``. ``low`` and ``high`` bound the 95%
    interval: that of ``results["intervals"]`` where it has one, else value plus and minus 1.96 standard errors, or Wilson's
    interval for a proportion of exactly 0 or 1; None without a standard error. ``n`` is the number of documents scored.
    """
    rows = []
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        n = _documents(results, task)
        direction = results.get("higher_is_better", {}).get(task) or {}
        known = results.get("intervals", {}).get(task, {})
        for key, value in metrics.items():
            metric, _, name = key.partition(",")
            if not name or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{metric}_stderr,{name}")
            stderr = float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None
            low, high = known.get(key) or interval(float(value), stderr, n=n, proportion=is_proportion(metric))
            rows.append(
                {
                    "task": task,
                    "metric": metric,
                    "filter": name,
                    "value": float(value),
                    "stderr": stderr,
                    "n": n,
                    "higher_is_better": direction.get(metric),
                    "low": low,
                    "high": high,
                }
            )
    return rows


def interval(
    value: float, stderr: float | None, *, n: int | None = None, proportion: bool = False
) -> tuple[float | None, float | None]:
    """95% interval: value -+ 1.96 stderr; Wilson's for ``n`` draws that were all 0 or all 1; (None, None)
    without a stderr.
    """
    if proportion and n and value in (0.0, 1.0):
        wilson = binomtest(round(value * n), n).proportion_ci(method="wilson")
        return float(wilson.low), float(wilson.high)
    if stderr is None:
        return None, None
    return value - Z95 * stderr, value + Z95 * stderr


def is_proportion(metric: str) -> bool:
    """Whether a metric is a mean of shares, between 0 and 1."""
    return metric.startswith(PROPORTIONS)


def merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Two results of lm-eval's shape, of different tasks, as one."""
    together = {key: {**first.get(key, {}), **second.get(key, {})} for key in BY_TASK if key in first or key in second}
    return {**first, **second, **together}


def interval_text(row: Mapping[str, Any], digits: int = 3) -> str:
    """``0.412 ± 0.031``; ``1.000 [0.963, 1.000]`` when the interval is lopsided; the value alone when there
    is none.
    """
    value, low, high = row["value"], row["low"], row["high"]
    if low is None or high is None:
        return f"{value:.{digits}f}"
    if math.isclose(high - value, value - low, abs_tol=1e-9):
        return f"{value:.{digits}f} ± {high - value:.{digits}f}"
    return f"{value:.{digits}f} [{max(low, 0.0):.{digits}f}, {high:.{digits}f}]"


def results_table(results: Mapping[str, Mapping[str, Any]], *, title: str | None = None) -> Table:
    """Models side by side: ``results`` maps a name to lm-eval's results; cells are the value with its 95%
    interval.

    The number of documents is that of the first model with the task; a model scored on another number says so
    in its cell.
    """
    table = Table(title=title, caption="value ± 95% interval", caption_justify="left")
    table.add_column("task")
    table.add_column("metric")
    table.add_column("n", justify="right")
    for model in results:
        table.add_column(model, justify="right")
    for (task, metric), cells in by_metric(results).items():
        n = next(iter(cells.values()))["n"]
        texts = [_cell(cells.get(model), n) for model in results]
        table.add_row(task, metric, "" if n is None else str(n), *texts)
    return table


def by_metric(results: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, dict[str, Any]]]:
    """{(task, metric label): {model: summary row}} in the order of first appearance; the label names the
    filter unless it is ``none``.
    """
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for model, result in results.items():
        for row in summary_rows(result):
            label = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
            table.setdefault((row["task"], label), {})[model] = row
    return table


def write_results(results: Mapping[str, Any], output_path: str | os.PathLike[str], *, name: str | None = None) -> Path:
    """Writes ``results`` as JSON: to ``output_path`` when it ends in .json, else to
    ``output_path/<name>.json``.

    The file appears whole or not at all. ``name`` defaults to the task names joined by ``+``.
    """
    path = Path(output_path)
    if path.suffix != ".json":
        path = path / f"{name or '+'.join(results['results'])}.json".replace("/", "__")
    return write_whole(path, json.dumps(results, indent=2, ensure_ascii=False, default=str) + "\n")


def _documents(results: Mapping[str, Any], task: str) -> int | None:
    counts = results.get("n-samples", {})
    if task in counts:
        return int(counts[task]["effective"])
    children = [_documents(results, child) for child in results.get("group_subtasks", {}).get(task, ())]
    return sum(n for n in children if n is not None) or None


def _cell(row: Mapping[str, Any] | None, n: int | None) -> str:
    if row is None:
        return ""
    return interval_text(row) if row["n"] == n else f"{interval_text(row)} (n={row['n']})"

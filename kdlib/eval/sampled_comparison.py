"""Several models on the same problems: every score with its interval, and what each model gains over the one before it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from rich.table import Table

from kdlib.eval.acceptance_statistics import ratio, sums
from kdlib.eval.results import by_metric, interval, is_proportion

Results = Mapping[str, Mapping[str, Any]]  # a model's name -> its results, of lm-eval's shape


def compare(results: Results, *, resamples: int = 2000) -> dict[str, Any]:
    """comparison.json: {"models": [...], "rows": [{"task", "metric", "n", "higher_is_better", "values", "gains"}]}.

    ``values``: {model: {"value", "low", "high"}}. ``gains``: {model: {"over": the model before, "value", "low", "high", "n"}},
    the difference over the ``n`` problems that both have, with its 95% interval by bootstrap over these problems, both models'
    scores of a problem drawn together; models without scores by problem have none.
    """
    rows = []
    for (task, label), cells in by_metric(results).items():
        first = next(iter(cells.values()))
        rows.append(
            {
                "task": task,
                "metric": label,
                "n": first["n"],
                "higher_is_better": first["higher_is_better"],
                "values": {name: {key: row[key] for key in ("value", "low", "high")} for name, row in cells.items()},
                "gains": _gains(results, task=task, row=first, resamples=resamples),
            }
        )
    return {"models": list(results), "rows": rows}


def gains_table(comparison: Mapping[str, Any]) -> Table | None:
    """What each model gains, a column per pair of neighbours; None where nothing is compared."""
    pairs = list(pairwise(comparison["models"]))
    rows = [row for row in comparison["rows"] if row["gains"]]
    if not rows:
        return None
    table = Table(caption="difference with its 95% interval, paired over problems", caption_justify="left")
    for title in ("task", "metric", *(f"{model} over {before}" for before, model in pairs)):
        table.add_column(title, justify="left" if title in ("task", "metric") else "right")
    for row in rows:
        table.add_row(row["task"], row["metric"], *(gain_text(row["gains"].get(model)) for _, model in pairs))
    return table


def gain_text(gain: Mapping[str, Any] | None) -> str:
    """``+0.120 [0.031, 0.209]``"""
    if gain is None:
        return ""
    value = f"{gain['value']:+.3f}"
    return value if gain["low"] is None else f"{value} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def _gains(results: Results, *, task: str, row: Mapping[str, Any], resamples: int) -> dict[str, Any]:
    key = f"{row['metric']},{row['filter']}"
    found = {name: _by_problem(result, task=task, key=key) for name, result in results.items()}
    gains = {}
    for before, model in pairwise(results):
        shared = found[before].keys() & found[model].keys()
        if shared:
            order = sorted(shared)
            pair = [[found[name][problem] for problem in order] for name in (before, model)]
            gains[model] = {"over": before, **_gain(*pair, proportion=is_proportion(row["metric"]), resamples=resamples)}
    return gains


def _by_problem(result: Mapping[str, Any], *, task: str, key: str) -> dict[Any, float]:
    known = result.get("per_problem", {}).get(task, {"ids": [], "values": {}})
    return dict(zip(known["ids"], known["values"][key], strict=True)) if key in known["values"] else {}


def _gain(before: Sequence[float], after: Sequence[float], *, proportion: bool, resamples: int) -> dict[str, Any]:
    differences = np.asarray(after) - np.asarray(before)
    value = float(differences.mean())
    if np.ptp(differences) == 0.0:  # resampling equal differences says nothing
        low, high = _newcombe(before, after) if proportion else (None, None)
    else:
        found = ratio(sums(differences, np.ones(len(differences))), resamples=resamples, seed=0)
        low, high = found.low, found.high
    return {"value": value, "low": low, "high": high, "n": len(differences)}


def _newcombe(before: Sequence[float], after: Sequence[float]) -> tuple[float | None, float | None]:
    """Of a difference of two proportions, from Wilson's interval of each, as if not paired (Newcombe 1998, method 10).

    Where all differences are equal and yet the proportions are not 0 or 1, nothing is known: (None, None).
    """
    p, q = statistics.fmean(before), statistics.fmean(after)
    if not {p, q} <= {0.0, 1.0}:
        return None, None
    (p_low, p_high), (q_low, q_high) = (interval(x, None, n=len(before), proportion=True) for x in (p, q))
    assert p_low is not None and p_high is not None and q_low is not None and q_high is not None
    return q - p - math.hypot(q - q_low, p_high - p), q - p + math.hypot(q_high - q, p - p_low)

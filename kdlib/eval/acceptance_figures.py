"""Plots of acceptance: along the response, by domain, by position in the draft, and by gamma.

A curve for each way of drafting; with several drafts a plot for each way and a curve for each draft.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from kdlib.eval import page
from kdlib.eval.acceptance_empirical import Decoded
from kdlib.eval.acceptance_expected import DraftSampling
from kdlib.eval.acceptance_measurement import AcceptanceResult
from kdlib.eval.acceptance_timing import Speed
from kdlib.eval.plots import Points, bar_plot, line_plot

Results = Mapping[str, AcceptanceResult]  # the draft's name -> what was measured, on the same prompts
Curve = Callable[[AcceptanceResult, DraftSampling], Points]
GAMMA = "num_speculative_tokens"


def expected_figures(results: Results) -> list[page.Block]:
    """Along the response, and by domain where there are some."""
    caption = "Expected acceptance, means over prompts."
    return [
        *_plots(results, "Along the response", _along, x="token of the response", y="acceptance_rate", caption=caption),
        *_domains(results),
    ]


def decoded_figures(results: Results) -> list[page.Block]:
    """By position in the draft (at the largest gamma), acceptance_length and speed-up by gamma."""
    caption = "Share of rounds that accept this position and all before it, at the largest gamma."
    figures = _plots(results, "By position in the draft", _positions, x="position", y="acceptance rate", caption=caption)
    figures += _plots(results, "Tokens per round", _lengths, x=GAMMA, y="acceptance_length", caption="Bonus token included.")
    caption = "One prompt at a time."
    return figures + _plots(results, "Speed-up", _measured, x=GAMMA, y="times the target alone", caption=caption)


def _plots(results: Results, title: str, curve: Curve, *, x: str, y: str, caption: str) -> list[page.Block]:
    """Curves without points are left out, and so are plots without curves."""
    plots: dict[str, dict[str, Points]] = {}
    for name, result in results.items():
        for way in result.expected:
            points = curve(result, way)
            if points[0]:
                where, label = (title, way) if len(results) == 1 else (f"{title}, {way} drafts", _short(name))
                plots.setdefault(where, {})[label] = points
    return [
        page.Figure(title=where, svg=line_plot(curves, x=x, y=y, from_zero=True), caption=caption)
        for where, curves in plots.items()
    ]


def _domains(results: Results) -> list[page.Block]:
    bars: dict[str, list[dict[str, Any]]] = {}
    for name, result in results.items():
        for way, found in result.expected.items():
            for domain, of in found.by_domain.items():
                label = domain if len(results) == 1 else f"{domain}, {_short(name)}"
                bars.setdefault(f"By domain, {way} drafts", []).append({"label": label, **of.acceptance_rate.to_json()})
    return [
        page.Figure(
            title=title,
            svg=bar_plot(sorted(rows, key=lambda row: str(row["label"]).partition(",")[0]), x="acceptance_rate"),
            caption="Expected acceptance with 95% intervals over prompts.",
        )
        for title, rows in bars.items()
    ]


def _along(result: AcceptanceResult, way: DraftSampling) -> Points:
    parts = result.expected[way].along_response
    return [(part["start"] + part["stop"]) / 2 for part in parts], [part["acceptance_rate"] for part in parts]


def _positions(result: AcceptanceResult, way: DraftSampling) -> Points:
    rates = [found.acceptance_rate_per_position for found in _runs(result, way)[-1:]]
    return ([float(i + 1) for i in range(len(rates[0]))], rates[0]) if rates else ([], [])


def _lengths(result: AcceptanceResult, way: DraftSampling) -> Points:
    runs = _runs(result, way)
    return [found.num_speculative_tokens for found in runs], [found.acceptance_length.value for found in runs]


def _measured(result: AcceptanceResult, way: DraftSampling) -> Points:
    speeds: list[Speed] = [] if result.timing is None else list(result.timing.speeds)
    chosen = sorted((s for s in speeds if s.draft_sample_method == way), key=lambda s: s.num_speculative_tokens)
    return [speed.num_speculative_tokens for speed in chosen], [speed.measured_speedup for speed in chosen]


def _runs(result: AcceptanceResult, way: DraftSampling) -> list[Decoded]:
    chosen = [found for found in result.empirical if found.draft_sample_method == way]
    return sorted(chosen, key=lambda found: found.num_speculative_tokens)


def _short(name: str) -> str:
    """The end of a long name, which is where paths differ."""
    return name if len(name) <= 24 else f"…{name[-23:]}"

"""Plots of Jacobi decoding: tokens per forward by block, iterations per block; several models side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdlib.eval import page
from kdlib.eval.jacobi_measurement import JacobiResult
from kdlib.eval.plots import Points, bar_plot, line_plot

Results = Mapping[str, JacobiResult]  # the model's name -> what was measured, on the same prompts


def block_figures(results: Results) -> list[page.Block]:
    """Tokens per forward by block in one plot, a curve for each model."""
    curves = {name: _curve(result) for name, result in results.items()}
    return [
        page.Figure(
            title="Tokens per forward by block",
            svg=line_plot(curves, x="block", y="tokens per forward", from_zero=True),
            caption="Tokens number b n + 1 to b n + n over the passes that began in block b; plain greedy decoding is 1.",
        )
    ]


def iteration_figures(results: Results) -> list[page.Block]:
    """Share of blocks by their iterations, a histogram for each model over the same range."""
    seen = [iterations for result in results.values() for iterations, _ in result.counts.distribution]
    caption = "Passes that began in the block, the verifying one included; blocks that took a pass."
    return [
        page.Figure(
            title="Iterations per block" if len(results) == 1 else f"Iterations per block, {name}",
            svg=bar_plot(_shares(result, range(min(seen), max(seen) + 1)), x="share of blocks"),
            caption=caption,
        )
        for name, result in results.items()
    ]


def _curve(result: JacobiResult) -> Points:
    return [of.block for of in result.by_block], [of.tokens_per_forward.value for of in result.by_block]


def _shares(result: JacobiResult, iterations: range) -> list[dict[str, Any]]:
    counts = dict(result.counts.distribution)
    total = sum(counts.values())
    return [{"label": str(k), "value": counts.get(k, 0) / total, "low": None, "high": None} for k in iterations]

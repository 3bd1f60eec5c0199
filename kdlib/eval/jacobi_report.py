"""Jacobi decoding as a table in the terminal and as one HTML page; several models side by side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table as RichTable

from kdlib.eval import page
from kdlib.eval.acceptance_statistics import Estimate, ratio_change
from kdlib.eval.jacobi_counted import COUNTED
from kdlib.eval.jacobi_figures import Results, block_figures, iteration_figures
from kdlib.eval.jacobi_measurement import JacobiResult
from kdlib.eval.report_parts import closing_sections, interval_text, notes, terminal_table

RESAMPLES = 2000
MEASURES = (
    "tokens per forward",
    "iterations per block",
    "fast-forward",
    "fast-forwarded per block",
    "stationary per block",
    "greedy tokens",
    "tokens per second",
    "times greedy",
)


def jacobi_rows(results: Results) -> list[list[str]]:
    """A row for each of MEASURES: its name, and what it is for every model."""
    return [list(row) for row in zip(MEASURES, *map(_cells, results.values()), strict=True)]


def _cells(result: JacobiResult) -> list[str]:
    t, a, speed = result.trajectories, result.agreement, result.timing
    kept = [""] * 3 if t is None else [interval_text(e, 2) for e in (t.fast_forward, t.fast_forwarded, t.stationary)]
    return [
        interval_text(result.tokens_per_forward),
        interval_text(result.iterations_per_block, 2),
        *kept,
        "" if a is None else f"{a.identical} of {a.prompts}",
        "" if speed is None else f"{speed.tokens_per_second:,.1f}",
        "" if speed is None else interval_text(speed.speedup, 2),
    ]


def jacobi_table(results: Results) -> RichTable:
    """One or several models, for the terminal."""
    result = next(iter(results.values()))
    title = f"Jacobi decoding, block_size {result.settings['block_size']}, max_new_tokens {result.settings['max_new_tokens']}"
    return terminal_table(
        ["", *results],
        jacobi_rows(results),
        title=title,
        caption="tokens per forward: (new tokens - 1) / passes, the prompt's left out; greedy decoding is 1. "
        "greedy tokens: prompts whose tokens are those of greedy decoding. 95% intervals over prompts",
    )


def jacobi_lines(results: Results) -> list[str]:
    """What the numbers mean: losslessness, speed, change between models."""
    said = [f"{name}: {line}" if len(results) > 1 else line for name, result in results.items() for line in _findings(result)]
    *earlier, (name, after) = results.items()
    return said + [_change(name, other, after=after, before=before) for other, before in earlier]


def _findings(result: JacobiResult) -> list[str]:
    said = [] if result.agreement is None else [check_line(result)]
    if speed := result.timing:
        said.append(
            f"{speed.tokens_per_second:,.1f} tokens per second against {speed.greedy_tokens_per_second:,.1f} by greedy "
            f"decoding ({interval_text(speed.speedup, 2)} times), {speed.forwards:,} passes against {speed.greedy_forwards:,}, "
            f"over {speed.prompts} prompts one at a time on this machine ({speed.machine})"
        )
    return said


def check_line(result: JacobiResult) -> str:
    """Whether the output is the model's own; the words of a decoder that does not promise it say how near it is."""
    a, check = result.agreement, result.check
    assert a is not None
    if check is not None:
        return check.line
    return (
        f"not lossless: {a.identical} of {a.prompts} prompts identical to the model's own greedy tokens, "
        f"{a.share:.1%} of these before the first difference"
    )


def _change(name: str, other: str, *, after: JacobiResult, before: JacobiResult) -> str:
    change = change_of(after, before)
    bounds = "" if change.low is None or change.high is None else f" [{change.low:+.1%}, {change.high:+.1%}]"
    return f"{name} against {other}: tokens per forward {change.value:+.1%}{bounds}"


def change_of(after: JacobiResult, before: JacobiResult) -> Estimate:
    """after / before - 1 of the tokens per forward on the same prompts, which are resampled together."""
    seed = after.settings["seed"]
    return ratio_change(after.counts.per_prompt, before.counts.per_prompt, resamples=RESAMPLES, seed=seed)


def jacobi_sections(results: Results) -> list[page.Section]:
    """Plots, tables, what they mean, and what they count."""
    table = page.Table(header=["", *results], rows=jacobi_rows(results), numeric=range(1, 1 + len(results)))
    return [
        page.Section(title="Tokens per forward", blocks=[*block_figures(results), table]),
        page.Section(title="Iterations per block", blocks=[*iteration_figures(results)]),
        notes("Findings", jacobi_lines(results)),
        notes("What is counted", [f"{name}: {text}" for name, text in COUNTED.items()]),
    ]


def write_jacobi_page(path: str | os.PathLike[str], results: Results, *, more: Sequence[page.Section] = ()) -> Path:
    """The page with all models, the last one as the subject, and ``more`` sections after the findings; returns its path."""
    name, result = list(results.items())[-1]
    settings = {**result.settings, "model": ", ".join(results), "prompts": len(result.prompts)}
    *found, counted = jacobi_sections(results)
    return page.write_page(
        path,
        title=f"Jacobi decoding of {name}",
        lead=f"How many tokens a forward pass gives on {len(result.prompts):,} prompts.",
        headline=page.Numbers(items=_headline(results)),
        sections=[*found, *more, counted, *closing_sections(settings, result.prompts)],
    )


def _headline(results: Results) -> list[tuple[str, str, str]]:
    items = [
        ("Tokens per forward", f"{result.tokens_per_forward.value:.2f}", interval_text(result.tokens_per_forward) + f", {name}")
        for name, result in results.items()
    ]
    result = list(results.values())[-1]
    if result.timing is not None:
        items.append(("Against greedy decoding", f"{result.timing.speedup.value:.2f}x", "one prompt at a time, this machine"))
    if result.check is not None:
        items.append(("Output is greedy decoding's", "yes" if result.passed else "NO", f"{result.check.prompts} prompts"))
    return items

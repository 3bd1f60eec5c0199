"""What a served model's measurement says: a table, sentences about it, and a page with plots."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table as RichTable

from kdlib.eval.page import Block, Figure, Notes, Numbers, Section, Table, write_page
from kdlib.eval.plots import line_plot

HEADER = (
    "concurrency",
    "acceptance_length",
    "acceptance_rate",
    "per position",
    "TPOT p50",
    "TPOT p99",
    "tok/s",
    "requests",
    "failed",
)
COUNTED = (
    "acceptance_length: 1 + accepted / drafts by the server's counters, over the verify rounds that had a draft; the bonus "
    "token is counted, and so is what a stop cuts off. acceptance_rate: accepted / drafted tokens. Per position: share of "
    "these rounds that accept position i and all before it (unconditional).",
    "TPOT, time per output token: milliseconds from the first chunk to the last over the tokens after the first chunk, of each "
    "request, seen by the client. tok/s: output tokens of all requests over the time from the first request to the last token, "
    "prefill included.",
)
_FEW = 0.9  # share of tokens from rounds with a draft below which it is said


def served_table(found: Mapping[str, Any]) -> RichTable:
    """A row for every concurrency, with the ratios to the baseline where there is one."""
    table = RichTable()
    for name in _header(found):
        table.add_column(name, justify="right")
    for row in _rows(found):
        table.add_row(*row)
    return table


def remarks(found: Mapping[str, Any]) -> list[str]:
    """What the table does not say by itself: where speculation stops paying, and what is doubtful about the numbers."""
    return [*_payoff(found), *_doubts(found), *(_doubts(found["baseline"]) if "baseline" in found else ())]


def write_served_report(path: str | os.PathLike[str], found: Mapping[str, Any]) -> Path:
    """The measurement as one HTML page; returns its path."""
    said = remarks(found)
    asked = f"{found['prompts']} prompts of up to {found['max_tokens']} tokens at temperature {found['temperature']:g}"
    return write_page(
        path,
        title="Served acceptance",
        lead=f"{found['model']} at {found['server']}: {asked}.",
        headline=Numbers(items=_headline(found)),
        sections=[
            Section(title="By concurrency", blocks=[_page_table(found), *([Notes(items=said)] if said else [])]),
            Section(title="Plots", blocks=_figures(found)),
            Section(title="What is counted", blocks=[Notes(items=COUNTED)]),
        ],
    )


def _header(found: Mapping[str, Any]) -> list[str]:
    return [*HEADER, *(("baseline tok/s", "speed-up") if "baseline" in found else ())]


def _rows(found: Mapping[str, Any]) -> Iterator[list[str]]:
    for index, run in enumerate(found["runs"]):
        step, rates = run["time_per_output_token_ms"], run["acceptance_rate_per_position"]
        beside = []
        if "baseline" in found:
            ratio = found["speedup"][index]["tokens_per_second"]
            beside = [f"{found['baseline']['runs'][index]['tokens_per_second']:,.1f}", f"{ratio:.2f}x"]
        yield [
            str(run["concurrency"]),
            _number(run["acceptance_length"], 2),
            _number(run["acceptance_rate"], 3),
            "-" if rates is None else " ".join(f"{rate:.2f}" for rate in rates),
            _number(step["p50"], 2),
            _number(step["p99"], 2),
            f"{run['tokens_per_second']:,.1f}",
            str(run["requests"]),
            str(run["failed"]),
            *beside,
        ]


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _payoff(found: Mapping[str, Any]) -> Iterator[str]:
    if not found["speculates"]:
        yield f"{found['server']} does not speculate: it has speed, and no acceptance"
    elif not any(run["num_drafts"] for run in found["runs"]):
        yield f"{found['server']} speculates, and drafted nothing on these prompts"
    if "baseline" not in found:
        return
    slower = {ratio["concurrency"]: ratio["tokens_per_second"] for ratio in found["speedup"] if ratio["tokens_per_second"] < 1}
    named = ", ".join(f"{value:.2f}x at {concurrency}" for concurrency, value in sorted(slower.items()))
    faster = len(slower) < len(found["speedup"])
    if not slower:
        yield "speculation pays at every concurrency measured"
    elif faster:
        yield f"speculation stops paying at concurrency {found['stops_paying_at']} ({named} of the baseline's tok/s)"
    else:
        yield f"speculation pays at no concurrency measured ({named} of the baseline's tok/s)"
    if found["baseline"]["speculates"]:
        yield f"the baseline {found['baseline']['server']} speculates, too: the speed-up is over its method"
    if found["baseline"]["model"] != found["model"]:
        yield f"the servers serve different models: {found['model']} and {found['baseline']['model']}"


def _doubts(found: Mapping[str, Any]) -> Iterator[str]:
    for run in found["runs"]:
        where = f"{found['server']} at concurrency {run['concurrency']}"
        if run["failed"]:
            message = next(iter(run["failures"]))
            yield f"{where}: {run['failed']} of {run['requests']} requests failed and are in no number of speed ({message})"
        if run["unexplained_tokens"] > 0:
            others = "for requests that failed or were not ours" if run["failed"] else "for requests that were not ours"
            yield (
                f"{where}: the server generated {run['unexplained_tokens']:,} tokens {others}: "
                "its counters, and so the acceptance, hold those too; measure a server that does nothing else"
            )
        if run["unexplained_tokens"] < 0:
            yield f"{where}: the server counted {-run['unexplained_tokens']:,} tokens less than it sent: is it one of several?"
        if run["requests"] < run["concurrency"]:
            yield f"{where}: {run['requests']} prompts are too few to keep so many requests going"
        drafted = (run["num_drafts"] or 0) + run["num_accepted_tokens"]
        decoded = run["server_generation_tokens"] - run["requests"]  # the first token of a request comes from its prefill
        if run["num_drafts"] and drafted < _FEW * decoded:
            yield f"{where}: rounds with a draft gave {drafted / decoded:.0%} of the tokens; acceptance is that of these rounds"


def _page_table(found: Mapping[str, Any]) -> Table:
    header = _header(found)
    return Table(header=header, rows=list(_rows(found)), numeric=range(len(header)), caption="TPOT in milliseconds.")


def _headline(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    first = found["runs"][0]
    where = f"at concurrency {first['concurrency']}"
    items = []
    if first["acceptance_length"] is not None:
        gamma = found["num_speculative_tokens"]
        items.append(("acceptance_length", f"{first['acceptance_length']:.2f}", f"of at most {gamma + 1}, {where}"))
        items.append(("acceptance_rate", f"{first['acceptance_rate']:.3f}", where))
    items.append(("Tokens per second", f"{first['tokens_per_second']:,.0f}", where))
    if "baseline" in found:
        items.append(("Speed-up", f"{found['speedup'][0]['tokens_per_second']:.2f}x", f"of the baseline's tok/s, {where}"))
    return items


def _figures(found: Mapping[str, Any]) -> list[Block]:
    figures: list[Block] = []
    rates = {f"concurrency {run['concurrency']}": _by_position(run) for run in found["runs"] if run["num_drafts"]}
    if rates:
        svg = line_plot(rates, x="position", y="share of rounds", from_zero=True)
        figures.append(Figure(title="Acceptance by position", svg=svg, caption="Position i and all before it accepted."))
    sides = {"served": found["runs"], **({"baseline": found["baseline"]["runs"]} if "baseline" in found else {})}
    for title, y, value in (
        ("Throughput", "output tokens per second", lambda run: run["tokens_per_second"]),
        ("Time per output token", "milliseconds, p50", lambda run: run["time_per_output_token_ms"]["p50"]),
    ):
        curves = {name: _over_concurrency(runs, value) for name, runs in sides.items()}
        figures.append(Figure(title=title, svg=line_plot(curves, x="concurrency", y=y, order=list(sides), from_zero=True)))
    return figures


def _by_position(run: Mapping[str, Any]) -> tuple[Sequence[float], Sequence[float]]:
    rates = run["acceptance_rate_per_position"]
    return list(range(1, len(rates) + 1)), rates


def _over_concurrency(runs: Sequence[Mapping[str, Any]], value: Any) -> tuple[list[float], list[float]]:
    points = sorted((run["concurrency"], value(run)) for run in runs if value(run) is not None)
    return [concurrency for concurrency, _ in points], [y for _, y in points]

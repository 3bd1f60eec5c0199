"""The end of a generation: correct and incorrect traces in files of their own, report.json, report.html, a table."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kdlib.cli.generation.difficulty import difficulty_facts, difficulty_figure, difficulty_summary, write_judged
from kdlib.cli.generation.loop import EMPTY, METRICS_FILE
from kdlib.cli.generation.statistics import VERDICTS, Tally, cost
from kdlib.data.traces import Prompts, TraceIndex, read_traces
from kdlib.data.traces.writer import Trace
from kdlib.eval import page
from kdlib.eval.plots import bar_plot, stacked_plot
from kdlib.eval.results import interval_text
from kdlib.files import write_whole

SAMPLES = 3  # of each verdict in the report
BINS = 40
SERIES = {"correct": True, "incorrect": False, "not judged": None}
DEFAULT_MAX_LENGTH = 1024  # of kdlib distill


def finished(directory: Path, *, prompts: Prompts, verified: bool) -> dict[str, Any]:
    """Writes everything beside the shards and returns report.json's content."""
    index, tally = TraceIndex.load(directory), Tally(verified=verified, empty=EMPTY)
    samples: dict[bool | None, list[Trace]] = {verdict: [] for verdict in VERDICTS}
    for trace in read_traces(directory):
        tally.add(trace)
        if len(samples[trace["correct"]]) < SAMPLES:
            samples[trace["correct"]].append(trace)
    for shard in index.shards.values():
        for skipped in shard.skipped:
            tally.skip(skipped)
    if verified:
        write_judged(directory, tally)
    report = {
        "prompts": len(prompts),
        "duplicate_prompts": prompts.duplicates,
        "skipped_prompts": dict(prompts.skipped),
        **tally.report(),
        **({"difficulty": difficulty_summary(tally)} if verified else {}),
        **_cost(directory),
        "settings": index.settings,
    }
    write_whole(directory / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    _write_page(directory, report, tally, [trace for traces in samples.values() for trace in traces])
    return report


def _cost(directory: Path) -> dict[str, Any]:
    with (directory / METRICS_FILE).open(encoding="utf-8") as lines:
        return cost(lines)


def summary_table(report: Mapping[str, Any]) -> Table:
    """What a user wants to know first."""
    table = Table(show_header=False, title="completions", title_justify="left")
    for name, value in _facts(report):
        table.add_row(name, value)
    return table


def closing_lines(directory: Path, report: Mapping[str, Any], *, shards: int) -> list[str]:
    """The files, and the command that trains on them."""
    rows = f"{directory}/shard-*.jsonl"
    lines = [f"traces  {rows} ({shards} files, {report['traces']:,} traces)"]
    if "verdicts" in report:
        rows = str(directory / "correct.jsonl")
        lines += [f"correct {rows}", f"wrong   {directory / 'incorrect.jsonl'}"]
    lines.append(f"report  {directory / 'report.html'}")
    if "verdicts" in report and report["verdicts"]["correct"] == 0:
        return [*lines, "no completion is correct: look at the samples in the report before you train on anything"]
    words = ["kdlib", "distill", "--dataset_name", rows, "--model", "STUDENT", "--objective", "CrossEntropy"]
    if report["longest_row"] > DEFAULT_MAX_LENGTH:
        words += ["--max_length", str(report["longest_row"])]
    return [*lines, f"next    {shlex.join([*words, '--output_dir', 'OUT'])}"]


def _facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    left_out = sum(report["skipped_prompts"].values())
    facts = [
        ("prompts", f"{report['prompts']:,} ({report['duplicate_prompts']:,} duplicates and {left_out:,} unusable left out)"),
        (
            "completions",
            f"{report['completions']:,} ({report['duplicate_completions']:,} duplicates, {_count(report)} unusable)",
        ),
    ]
    for k, row in report.get("pass_at", {}).items():
        facts.append(("pass rate" if k == "1" else f"pass@{k}", f"{interval_text(row)} (n={row['problems']:,} prompts)"))
    if report.get("not_judged"):
        facts.append(("not judged", ", ".join(f"{n:,} x {reason}" for reason, n in report["not_judged"].items())))
    for name, lengths in report["lengths"].items():
        if lengths is not None:
            which = "tokens of a completion" if name == "all" else f"  {name}"
            facts.append((which, f"{lengths['mean']:,.1f} (median {lengths['median']:,}, 95% up to {lengths['p95']:,})"))
    return [
        *facts,
        *difficulty_facts(report),
        ("cut at the limit", f"{report['clipped_ratio']:.1%}"),
        ("tokens generated", f"{report['generated_tokens']:,} in {report['seconds']:,.0f} s"),
        ("tokens per second", f"{report['tokens_per_second']:,.0f}"),
    ]


def _count(report: Mapping[str, Any]) -> str:
    return f"{sum(report['skipped_completions'].values()):,}"


def _write_page(directory: Path, report: Mapping[str, Any], tally: Tally, samples: Sequence[Trace]) -> None:
    figures: list[page.Block] = []
    if report["traces"]:
        caption = "Completions as drawn, duplicates counted."
        figures.append(page.Figure(title="Lengths", svg=_histogram(tally), caption=caption))
    passes = [{**row, "label": f"pass@{k}"} for k, row in report.get("pass_at", {}).items()]
    if passes:
        caption = "The chance that one of k completions is right; intervals over prompts."
        figures.append(page.Figure(title="Pass rate", svg=bar_plot(passes, x="share of prompts"), caption=caption))
    figures += difficulty_figure(report)
    facts = page.Table(header=["what", "value"], rows=[list(fact) for fact in _facts(report)])
    settings = page.Table(header=["option", "value"], rows=[[key, _text(value)] for key, value in report["settings"].items()])
    page.write_page(
        directory / "report.html",
        title=directory.resolve().name,
        lead=f"Completions by {report['settings']['model']}.",
        headline=page.Numbers(items=_headline(report)),
        sections=[
            page.Section(title="Completions", blocks=[*figures, facts]),
            page.Section(title="Left out", blocks=_left_out(report)),
            page.Section(title="Samples", blocks=[_sample(trace) for trace in samples]),
            page.Section(title="Settings", blocks=[settings]),
        ],
    )


def _headline(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    items = [("Prompts", f"{report['prompts']:,}", ""), ("Completions", f"{report['completions']:,}", "as drawn")]
    if "1" in report.get("pass_at", {}):
        row = report["pass_at"]["1"]
        bounds = "" if row["low"] is None else f"95%: {max(row['low'], 0.0):.3f} to {row['high']:.3f}"
        items.append(("Pass rate", f"{row['value']:.3f}", bounds))
    items.append(("Cut at the limit", f"{report['clipped_ratio']:.1%}", "of completions"))
    return [*items, ("Tokens per second", f"{report['tokens_per_second']:,.0f}", f"{report['generated_tokens']:,} tokens")]


def _left_out(report: Mapping[str, Any]) -> list[page.Block]:
    rows = [["prompt", reason, f"{n:,}"] for reason, n in report["skipped_prompts"].items()]
    rows += [["prompt", "an earlier row has it", f"{n:,}"] for n in [report["duplicate_prompts"]] if n]
    rows += [["completion", reason, f"{n:,}"] for reason, n in report["skipped_completions"].items()]
    rows += [["completion", "the prompt has it already", f"{n:,}"] for n in [report["duplicate_completions"]] if n]
    rows += [["verdict", reason, f"{n:,}"] for reason, n in report.get("not_judged", {}).items()]
    return [page.Table(header=["what", "why", "how many"], rows=rows, numeric=[2])] if rows else []


def _histogram(tally: Tally) -> Any:
    """Stacked bars over the length in tokens, one colour a verdict: areas with a step at each edge."""
    longest = max(max(lengths, default=0) for lengths in tally.lengths.values())
    width = -(-(longest + 1) // BINS)
    series = {}
    for name, verdict in SERIES.items():
        counts: Counter[int] = Counter()
        for length, n in tally.lengths[verdict].items():
            counts[length // width] += n
        if counts:
            bins = range(longest // width + 1)
            edges = [float(edge) for b in bins for edge in (b * width, (b + 1) * width)]
            series["completions" if not tally.verified else name] = (edges, [float(counts[b]) for b in bins for _ in range(2)])
    return stacked_plot(series, x="tokens", y="completions")


def _sample(trace: Trace) -> page.Sample:
    asked = trace["prompt"] if isinstance(trace["prompt"], str) else "\n".join(m["content"] for m in trace["prompt"])
    answers = [("teacher", trace["completion"], trace["correct"])]
    return page.Sample(prompt=asked, reference=trace.get("answer", ""), answers=answers)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

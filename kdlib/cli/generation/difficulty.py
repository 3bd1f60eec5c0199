"""How hard the prompts were for who answered them, for the report and beside every completion with a verdict."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from kdlib.cli.generation.statistics import VERDICTS, Tally
from kdlib.data.traces import read_traces
from kdlib.data.traces.writer import line, whole_file
from kdlib.eval import page
from kdlib.eval.plots import stacked_plot

BINS = 10


def difficulties(tally: Tally) -> dict[int, float]:
    """{prompt: share of its judged completions, as drawn, that are wrong}: 0 is easy, 1 hard."""
    return {prompt: 1 - tally.correct[prompt] / judged for prompt, judged in tally.judged.items() if judged}


def write_judged(directory: Path, tally: Tally) -> None:
    """correct.jsonl and incorrect.jsonl: the shards' lines by verdict, each with its prompt's ``difficulty``."""
    hard = difficulties(tally)
    with ExitStack() as stack:
        files = {v: stack.enter_context(whole_file(directory / f"{VERDICTS[v]}.jsonl")) for v in (True, False)}
        for trace in read_traces(directory):
            if trace["correct"] is not None:
                told = {**trace, "difficulty": hard[trace["prompt_id"]]}
                files[trace["correct"]].write(line(told).encode())


def difficulty_summary(tally: Tally) -> dict[str, Any]:
    """Over prompts: mean difficulty, how many have right completions alone, both kinds or wrong ones alone, a histogram."""
    hard = list(difficulties(tally).values())
    bins = Counter(min(int(share * BINS), BINS - 1) for share in hard)
    return {
        "mean": statistics.fmean(hard) if hard else None,
        "prompts": len(hard),
        "all_right": sum(share == 0 for share in hard),
        "both": sum(0 < share < 1 for share in hard),
        "all_wrong": sum(share == 1 for share in hard),
        "histogram": [{"from": i / BINS, "to": (i + 1) / BINS, "prompts": bins[i]} for i in range(BINS)],
    }


def difficulty_facts(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table: what pairs can be made of, and whether wrong completions are longer than right ones."""
    found = report.get("difficulty")
    if not found or not found["prompts"]:
        return []
    counts = ", ".join(
        f"{found[key]:,} {name}" for key, name in (("all_right", "right"), ("both", "both"), ("all_wrong", "wrong"))
    )
    facts = [("prompts answered", counts)]
    right, wrong = report["lengths"]["correct"], report["lengths"]["incorrect"]
    if right and wrong:
        facts.append(("wrong to right length", f"{wrong['mean'] / right['mean']:.2f}"))
    return facts


def difficulty_figure(report: Mapping[str, Any]) -> list[page.Block]:
    """The histogram, where anything was judged."""
    found = report.get("difficulty")
    if not found or not found["prompts"]:
        return []
    edges = [edge for one in found["histogram"] for edge in (one["from"], one["to"])]
    counts = [float(one["prompts"]) for one in found["histogram"] for _ in range(2)]
    caption = "Share of a prompt's completions that are wrong; the curriculum goes from left to right."
    return [
        page.Figure(
            title="Difficulty", svg=stacked_plot({"prompts": (edges, counts)}, x="difficulty", y="prompts"), caption=caption
        )
    ]

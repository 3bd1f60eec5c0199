"""What an evaluation found: a table of all models, what each gains, how it was sampled, and the files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from kdlib.cli.evaluation.asked import COMPARISON, Asked
from kdlib.cli.evaluation.judged import reasons
from kdlib.eval import comparison_report, results_table, write_results
from kdlib.eval.sampled_comparison import compare, gains_table
from kdlib.files import write_whole

Results = Mapping[str, Mapping[str, Any]]


def show(asked: Asked, results: Results) -> None:
    """Tables and notes on stdout and, where asked for, the files."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(results_table(results if asked.keeps else {Path(asked.general.model).name: results[asked.name]}))
    comparison = compare(results, resamples=asked.sampled.resamples)
    gains = gains_table(comparison)
    if gains is not None:
        console.print(gains)
    said = [line for name, found in results.items() for line in notes(name, found)]
    for line in said:
        console.print(line, markup=False)
    if asked.directory is not None:
        files = written(asked.directory, results, comparison, notes=said)
        console.print(f"written {', '.join(map(str, files))}", markup=False)
    elif asked.general.output_path:
        console.print(f"written {write_results(results[asked.name], asked.general.output_path)}", markup=False)


def notes(name: str, results: Mapping[str, Any]) -> list[str]:
    """How problems were sampled, and what is missing or cut; how many rows a text had."""
    lines = [line for task, facts in results.get("sampled", {}).items() for line in _sampled(f"{name}, {task}", facts)]
    if "bits_per_byte" in results or "bits_per_byte_bound" in results:
        counts = ", ".join(f"{results[key]:,} {key}" for key in ("rows", "truncated", "tokens", "bytes"))
        lines.append(f"{results['dataset']}: {counts}")
    return lines


def written(directory: Path, results: Results, comparison: Mapping[str, Any], *, notes: list[str]) -> list[Path]:
    """One file for each model, the comparison, and a page."""
    paths = [write_results(found, directory, name=name) for name, found in results.items()]
    text = json.dumps(comparison, indent=1, ensure_ascii=False) + "\n"
    page = comparison_report(
        directory / f"{COMPARISON}.html",
        title="Evaluation",
        lead=", ".join(f"{name}: {found['model_name']}" for name, found in results.items()),
        models=[{"name": name, "results": found} for name, found in results.items()],
        notes=notes,
    )
    return [*paths, write_whole(directory / f"{COMPARISON}.json", text), page]


def _sampled(what: str, facts: Mapping[str, Any]) -> list[str]:
    drawn = f"{facts['completions']:,} completions, {facts['n']} a problem, of up to {facts['max_completion_length']:,} tokens"
    lines = [f"{what}: {drawn}; {facts['sampling']}"]
    if facts["not_applied"]:
        asked = ", ".join(f"{key} {value}" for key, value in facts["not_applied"].items())
        lines.append(f"{what}: its generation_config.json asks for {asked}, too, which is not applied")
    if facts["not_judged"]:
        total = sum(facts["not_judged"].values())
        lines.append(f"{what}: {total:,} completions not judged, counted as wrong: {reasons(facts['not_judged'])}")
    if facts["unanswered"]:
        lines.append(f"{what}: {facts['unanswered']:,} completions end within their thinking, counted as wrong and truncated")
    if facts["left_out"]:
        lines.append(f"{what}: rows left out: {reasons(facts['left_out'])}")
    return lines

"""What a finished stage made, in a few words, from what its command leaves in its directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kdlib.cli.recipe.commands import COMMANDS
from kdlib.cli.recipe.stage import Stage
from kdlib.eval.report import read_metrics


def made(stage: Stage, directory: Path) -> str:
    """A line for the report; "" where the command leaves nothing to count."""
    of = _training if COMMANDS[stage.command].run is not None else _FACTS.get(stage.command)
    return "" if of is None else of(directory)


def own_page(directory: Path) -> Path | None:
    """The stage's own report."""
    return next(iter(sorted(directory.glob("*.html"))), None)


def _training(directory: Path) -> str:
    logged = [line for line in read_metrics(directory / "metrics.jsonl") if "grad_norm" in line]
    return f"{logged[-1]['step']:,} steps, loss {logged[-1]['loss']:.4g}" if logged else "no step was logged"


def _generated(directory: Path) -> str:
    report = _read(directory / "report.json")
    if "verdicts" not in report:
        return f"{report['completions']:,} completions"
    return f"{report['verdicts']['correct']:,} correct of {report['completions']:,} completions"


def _cached(directory: Path) -> str:
    return f"signals of {_read(directory / 'cache.json')['summary']['tokens']:,} tokens"


def _decoded(directory: Path) -> str:
    return f"{_read(directory / 'index.json')['prompts']:,} prompts decoded"


def _compared(directory: Path) -> str:
    path = directory / "comparison.json"
    return f"{len(_read(path)['models'])} models scored" if path.is_file() else ""


def _read(path: Path) -> Mapping[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


_FACTS: Mapping[str, Callable[[Path], str]] = {
    "generate": _generated,
    "cache": _cached,
    "trajectories jacobi": _decoded,
    "trajectories diffusion": _decoded,
    "evaluate": _compared,
}

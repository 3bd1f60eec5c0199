"""A page that compares models side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from kdlib.eval.page import Figure, Notes, Numbers, Sample, Section, write_page
from kdlib.eval.plots import Points, line_plot
from kdlib.eval.scores import Facts, headline_scores, score_blocks


class Compared(TypedDict):
    """A model: lm-eval's ``results``, and ``details`` for columns before the scores, such as parameters."""

    name: str
    results: Mapping[str, Any]
    details: NotRequired[Facts]


class Solved(TypedDict):
    """A problem; ``answers`` maps a model's name to (its text, whether it is right, None when not judged)."""

    prompt: str
    reference: str
    answers: Mapping[str, tuple[str, bool | None]]


def comparison_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str,
    models: Sequence[Compared],
    curves: Mapping[str, Mapping[str, Points]] | None = None,
    samples: Sequence[Solved] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Writes a page with the models' scores and intervals, training curves, and solved problems.

    ``curves`` maps a y axis, as in ``eval loss (nats per token)``, to {series: (steps, values)}; a series
    named like a model has its colour. Returns the path.
    """
    names = [model["name"] for model in models]
    results = {model["name"]: model["results"] for model in models}
    details = {model["name"]: model.get("details", {}) for model in models}
    figures = [
        Figure(title=_title(y), svg=line_plot(series, y=y, order=names)) for y, series in (curves or {}).items() if series
    ]
    sections = [
        Section(title="Scores", blocks=score_blocks(results, details=details, order=names)),
        Section(title="Training", blocks=figures),
        Section(title="Sample problems", blocks=[_sample(problem) for problem in samples]),
        Section(title="Notes", blocks=[Notes(items=notes)] if notes else []),
    ]
    headline = Numbers(items=headline_scores(results))
    return write_page(path, title=title, lead=lead, headline=headline, sections=sections)


def _title(y: str) -> str:
    """The axis without its unit, as a heading."""
    name = y.partition(" (")[0]
    return name[:1].upper() + name[1:]


def _sample(problem: Solved) -> Sample:
    answers = [(name, text, right) for name, (text, right) in problem["answers"].items()]
    return Sample(prompt=problem["prompt"], reference=problem["reference"], answers=answers)

"""One HTML page from sections and blocks: self-contained, without scripts, readable in light and dark."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from kdlib.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """Headline numbers: (label, value, remark) each, as text."""

    kind: ClassVar[str] = "numbers"
    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A plot (from ``kdlib.eval.plots``) with its title and a caption that says what is counted."""

    kind: ClassVar[str] = "figure"
    title: str
    svg: Markup
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text cells under ``header``; the columns in ``numeric`` (indices) are set flush right."""

    kind: ClassVar[str] = "table"
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[int] = ()
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Code:
    """Text shown as it is; ``folded`` under a title that opens it."""

    kind: ClassVar[str] = "code"
    text: str
    folded: str = ""


@dataclass(frozen=True, kw_only=True)
class Notes:
    """Paragraphs, as a list when there are several."""

    kind: ClassVar[str] = "notes"
    items: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A problem, its reference answer, and (model, its text, whether it is right or None when not judged)."""

    kind: ClassVar[str] = "sample"
    prompt: str
    reference: str
    answers: Sequence[tuple[str, str, bool | None]]


Block = Numbers | Figure | Table | Code | Notes | Sample


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading, a sentence (``lead``) under it, and its blocks; neighbouring figures share a row."""

    title: str
    blocks: Sequence[Block]
    lead: str = ""


def write_page(
    path: str | os.PathLike[str],
    *,
    title: str,
    lead: str,
    sections: Sequence[Section],
    headline: Numbers | None = None,
) -> Path:
    """Renders the page to ``path`` and returns it; all text is escaped, empty sections are left out."""
    environment = Environment(
        loader=PackageLoader("kdlib.eval", package_path=""),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("report.html.jinja").render(
        title=title, lead=lead, sections=[s for s in sections if s.blocks], headline=headline
    )
    return write_whole(path, html)

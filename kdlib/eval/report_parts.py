"""What the tables and pages of a measurement on prompts have in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table as RichTable

from kdlib.eval import page
from kdlib.eval.acceptance_prompts import PromptSet
from kdlib.eval.acceptance_statistics import Estimate


def interval_text(estimate: Estimate, digits: int = 3) -> str:
    """``0.712 [0.690, 0.733]``"""
    value = f"{estimate.value:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def terminal_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str, left: int = 1, caption: str | None = None
) -> RichTable:
    """A table whose first ``left`` columns are set flush left, all others flush right."""
    table = RichTable(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index < left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def notes(title: str, items: Sequence[str]) -> page.Section:
    """A section of paragraphs; without any it is left off the page."""
    return page.Section(title=title, blocks=[page.Notes(items=items)] if items else [])


def left_out(prompts: PromptSet) -> list[str]:
    """How many rows were not used, by reason."""
    return [f"{count} x {reason}" for reason, count in prompts.left_out.items()]


def closing_sections(settings: Mapping[str, Any], prompts: PromptSet) -> list[page.Section]:
    """What was asked for, and which rows were not used."""
    rows = [[key, str(value)] for key, value in settings.items()]
    return [
        page.Section(title="Settings", blocks=[page.Table(header=["option", "value"], rows=rows)]),
        notes("Prompts left out", left_out(prompts)),
    ]

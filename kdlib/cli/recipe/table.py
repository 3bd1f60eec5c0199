"""What a recipe is about to do, as a table: each stage with every place that a rule has filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from kdlib.cli.recipe.commands import COMMANDS
from kdlib.cli.recipe.directory import RecipeDirectory
from kdlib.cli.recipe.stage import Stage

ALSO_READ = ("problems", "compare")  # beside what the rules fill
OUT = Path("OUT")  # the run's directory, short, because a line has room for few long paths


def plan_table(directory: RecipeDirectory, stages: Sequence[Stage], *, title: str) -> Table:
    """The table that is shown before the first stage starts."""
    table = Table(title=title, title_justify="left", caption=f"OUT is {directory.path}", caption_justify="left")
    for name in ("stage", "command", "reads", "writes", ""):
        table.add_column(name, overflow="fold")
    for stage in stages:
        target = OUT / stage.name / COMMANDS[stage.command].file
        table.add_row(stage.name, stage.command, "\n".join(_reads(stage)), str(target), _state(directory, stage))
    return table


def _reads(stage: Stage) -> list[str]:
    found = stage.located(OUT)
    options = [*COMMANDS[stage.command].takes, *ALSO_READ]
    return [f"{option}: {_shown(found[option])}" for option in options if found.get(option) is not None]


def _state(directory: RecipeDirectory, stage: Stage) -> str:
    if directory.done(stage) is not None:
        return "done"
    return "begun" if (directory.path / stage.name).is_dir() else ""


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    return str(value)

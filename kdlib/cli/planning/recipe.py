"""``kdlib plan FILE``: a recipe's own command planned, or each of its stages that trains."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from kdlib.cli.grammar import read_yaml
from kdlib.cli.parsing import option_names
from kdlib.cli.planning import command
from kdlib.cli.recipe.commands import COMMANDS, training_run
from kdlib.cli.recipe.file import read_recipe
from kdlib.cli.recipe.stage import Stage, is_reference
from kdlib.cli.recipe.wiring import wire


def run(path: str, words: Sequence[str]) -> int:
    """The exit code; ValueError with a line for each stage that does not fit."""
    content = read_yaml(path)
    if "stages" not in content:
        return command.run(command_of(content), ["--config", path, *words])
    stages = {stage.name: stage for stage in wire(read_recipe(path))}
    console, failures = Console(soft_wrap=True, highlight=False), []
    for stage in stages.values():
        if stage.command not in command.RUNS:
            continue
        console.print(f"\nstage {stage.name}: kdlib {stage.command}", style="bold", markup=False)
        try:
            _plan(stage, stages, words)
        except ValueError as error:
            console.print(str(error), style="red", markup=False)
            failures.append(f"stage {stage.name}: {error}")
    if failures:
        raise ValueError("; ".join(failures))
    return 0


def command_of(content: Mapping[str, Any]) -> str:
    """The training command that knows most of the options; the first of several."""
    known = {}
    for name in command.RUNS:
        kind = training_run(name)
        assert kind is not None
        known[name] = {option for cls in kind.classes() for option in option_names(cls)}
    return min(known, key=lambda name: len(set(content) - known[name]))


def _plan(stage: Stage, stages: Mapping[str, Stage], words: Sequence[str]) -> None:
    root = Path("OUT")
    options = {**stage.located(root), **{role: started_from(stage, role, stages, root=root) for role in ("model", "teacher")}}
    with tempfile.TemporaryDirectory(prefix="kdlib-plan-") as scratch:
        config = Path(scratch) / f"{stage.name}.yaml"
        config.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")
        command.run(stage.command, ["--config", str(config), *words])


def started_from(stage: Stage, role: str, stages: Mapping[str, Stage], *, root: Path) -> Any:
    """The model that training takes, before any stage: what has the same shape as the ``role`` of this stage."""
    value = stage.options.get(role)
    if value is None or not is_reference(value):
        return value
    maker = stages[value["from"]]
    changed = COMMANDS[maker.command].changes is not None and training_run(maker.command) is not None
    return started_from(maker, "model", stages, root=root) if changed else stage.located(root)[role]

"""A recipe as it is written: options that its stages share, and the stages, each a command of kdlib with options of its own."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdlib.cli.grammar import read_value, read_yaml
from kdlib.cli.recipe.commands import COMMANDS

BASE, TEACHER = "base", "teacher"  # the recipe's model and its teacher, wherever a stage names a model
TAKEN = (BASE, TEACHER, "recipe")  # recipe.yaml lies beside the stages' own files
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
_LATER = {"export": "export draft or export diffusion", "trajectories": "trajectories jacobi or trajectories diffusion"}


@dataclass(frozen=True, kw_only=True)
class Item:
    """A stage as the recipe has it."""

    name: str
    command: str
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``shared``: the options above the stages, without ``stages`` and ``output_dir``."""

    output_dir: str
    shared: Mapping[str, Any]
    items: tuple[Item, ...]


def read_recipe(path: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a YAML file with some of its shared options changed; ValueError with one line for what is none."""
    content = read_yaml(path)
    for name, value in (overrides or {}).items():
        _set(content, name.split("."), value)
    stages = content.pop("stages", None)
    if stages is None:
        raise ValueError(f"{path} has no stages: kdlib run takes recipes with stages, kdlib distill --config a single run")
    if not isinstance(stages, list) or not stages:
        raise ValueError(f"{path}: stages is a list of {{COMMAND: {{option: value}}}}, with at least one of them")
    output_dir = content.pop("output_dir", None)
    if not isinstance(output_dir, str):
        raise ValueError(f"{path}: output_dir missing: add output_dir: DIR, or --output_dir DIR")
    return Recipe(output_dir=output_dir, shared=content, items=_items(stages))


def override(name: str, values: Sequence[str]) -> Any:
    """The value of an option that was typed as these words; without any it is true."""
    found = [read_value(value, source=f"--{name}") for value in values]
    return True if not found else found[0] if len(found) == 1 else found


def near(name: str, known: Sequence[str]) -> str:
    """The nearest of the known names, or all of them."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {found[0]}?" if found else f"choose {', '.join(known)}"


def _set(content: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """content[a][b] = value for the keys a, b."""
    for key in keys[:-1]:
        if not isinstance(content.get(key), dict):
            content[key] = {}
        content = content[key]
    content[keys[-1]] = value


def _items(stages: Sequence[Any]) -> tuple[Item, ...]:
    found: list[Item] = []
    for number, stage in enumerate(stages, start=1):
        item = _item(stage, number=number, taken=[item.name for item in found])
        if item.name in (known.name for known in found):
            raise ValueError(f"two stages are named {item.name}: give one of them another name")
        found.append(item)
    return tuple(found)


def _item(stage: Any, *, number: int, taken: Sequence[str]) -> Item:
    """One stage; its name is the command, with a number from the second on, unless it has one."""
    if isinstance(stage, str):
        stage = {stage: None}
    if not isinstance(stage, dict) or len(stage) != 1:
        raise ValueError(f"stage {number} is written as {{COMMAND: {{option: value}}}} with one command, not as {stage}")
    command, options = next(iter(stage.items()))
    _check_command(str(command), number=number)
    if not isinstance(options, dict | None):
        raise ValueError(f"stage {number}, {command}: its options are written as {{option: value}}, not as {options}")
    options = {str(key): value for key, value in (options or {}).items()}
    name = options.pop("name", None) or _default_name(str(command), taken)
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name in TAKEN:
        raise ValueError(
            f"stage {number} is named {name!r}: a name is made of letters, digits, - and _, and is none of {', '.join(TAKEN)}"
        )
    return Item(name=name, command=str(command), options=options)


def _check_command(command: str, *, number: int) -> None:
    if command in _LATER:
        raise ValueError(f"stage {number}: {command} does several things: write {_LATER[command]}")
    if command not in COMMANDS:
        raise ValueError(f"stage {number}: no command {command!r} for a stage: {near(command, list(COMMANDS))}")


def _default_name(command: str, taken: Sequence[str]) -> str:
    name, number = command.replace(" ", "-"), 2
    while name in taken:
        name, number = f"{command.replace(' ', '-')}-{number}", number + 1
    return name

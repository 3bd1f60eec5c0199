"""A stage as it will run: its options, in which what another stage makes is named, and where all of it lies."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from kdlib.cli.recipe.commands import COMMANDS

Reference = dict[str, str]  # {"from": a stage, "file": a path in its directory, "" for the directory itself}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """``options``: all that the command is given but the place it writes to, with references to earlier stages in them.

    ``settings``: those of the options that the result depends on; ``fingerprint``: of these, and of every stage that is read.
    """

    name: str
    command: str
    options: Mapping[str, Any]
    settings: Mapping[str, Any]
    fingerprint: str

    @property
    def reads(self) -> tuple[str, ...]:
        """The names of the stages that this one takes something from."""
        return tuple(dict.fromkeys(found["from"] for found in references(dict(self.options))))

    def located(self, root: Path) -> dict[str, Any]:
        """The options as the command takes them, with paths."""
        written = {COMMANDS[self.command].writes: str(root / self.name)}
        return {**located(dict(self.options), root), **written}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The stages in order, and the directory they write below."""

    output_dir: str
    stages: tuple[Stage, ...]


def reference(name: str, file: str = "") -> Reference:
    return {"from": name, "file": file}


def is_reference(value: Any) -> bool:
    return isinstance(value, dict) and "from" in value and value.keys() <= {"from", "file"}


def references(value: Any) -> Iterator[Reference]:
    """Every reference in a value, however deep."""
    if is_reference(value):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from references(item)


def located(value: Any, root: Path) -> Any:
    """The value with paths in the place of references."""
    if is_reference(value):
        return str(place(value, root))
    if isinstance(value, dict):
        return {key: located(item, root) for key, item in value.items()}
    return [located(item, root) for item in value] if isinstance(value, list) else value


def place(found: Reference, root: Path) -> Path:
    """Where a reference points to; its last part may be a pattern."""
    return root / found["from"] / found.get("file", "")


def fingerprint(command: str, settings: Mapping[str, Any], read: Mapping[str, str]) -> str:
    """Of a command, its settings and the fingerprints of the stages that it reads."""
    content = json.dumps([command, settings, read], sort_keys=True, default=str)
    return xxhash.xxh3_128_hexdigest(content.encode())

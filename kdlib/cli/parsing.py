"""A command's options from dataclasses, YAML and the command line, by jsonargparse."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from kdlib.cli.grammar import CLASS_KEYS, OBJECTIVE_FIELDS, collapse, expand, expand_parts, read_value, read_yaml
from kdlib.cli.messages import parse_error, value_error
from kdlib.cli.names import LEFT_OUT, unknown

T = TypeVar("T")
FLAGS = ("--print_config", "--help", "-h", "--help_all")


class Options:
    """What was asked for: ``config`` has every option as users write it, ``build`` makes the dataclasses."""

    def __init__(self, parser: ArgumentParser, parsed: Any, *, classes: Sequence[type]) -> None:
        self._parser, self._parsed, self._classes = parser, parsed, classes
        self.config: dict[str, Any] = collapse(yaml.safe_load(parser.dump(parsed, skip_unset=False, skip_validation=True)))

    @property
    def instances(self) -> list[Any]:
        """One of each dataclass, in their order."""
        return [self.build(cls) for cls in self._classes]

    def build(self, cls: Callable[..., T], **more: Any) -> T:
        """The dataclass with its options and ``more``; ValueError with one line when it refuses their values."""
        ready = self._parser.instantiate(self._parsed)
        given = {name: ready[name] for name in option_names(cls) if name in ready}
        try:
            return cls(**{**given, **more})
        except ValueError as error:
            raise ValueError(value_error(str(error), self.config)) from error


def parse(command: str, description: str, classes: Sequence[type], words: Sequence[str]) -> Options | None:
    """Options of ``kdlib COMMAND``; None when help or --print_config was asked for, and done.

    ``--config FILE`` reads YAML, which the other words override. Raises ValueError with one line for what
    does not parse.
    """
    words = [_underscored(word) for word in words]
    if any(word in words for word in ("--help", "-h", "--help_all")):
        from kdlib.cli.help import show_help

        show_help(command, description, classes, everything="--help_all" in words)
        return None
    parser = _parser(command, classes)
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items() if name in option_names(cls)}
    asked = [_argument(*pair, hints=hints) for pair in _pairs(words)]
    try:
        parsed = parser.parse_args(asked)
    except ArgumentError as error:
        raise ValueError(parse_error(str(error), list(hints))) from error
    parsed.pop("config")
    options = Options(parser, parsed, classes=classes)
    if "--print_config" not in words:
        return options
    sys.stdout.write(yaml.safe_dump(options.config, sort_keys=False))
    return None


def option_names(cls: Any) -> list[str]:
    """The dataclass's fields that are options."""
    return [field.name for field in dataclasses.fields(cls) if field.init and field.name not in LEFT_OUT]


def _parser(command: str, classes: Sequence[type]) -> ArgumentParser:
    parser = ArgumentParser(prog=f"kdlib {command}", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config")
    for cls in classes:
        unused = {field.name for field in dataclasses.fields(cls)} & LEFT_OUT.keys()
        parser.add_class_arguments(cls, skip=unused, fail_untyped=False)
    return parser


def _underscored(word: str) -> str:
    """--print-config is --print_config."""
    name, equals, value = word.partition("=")
    return name[:2] + name[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """(option, the words after it); ValueError for words before the first option."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            raise ValueError(f"unexpected {word!r}: options are written as --name value")
    return (pair for pair in found if f"--{pair[0]}" not in FLAGS)


def _argument(name: str, values: list[str], *, hints: dict[str, Any]) -> str:
    """An option and its words as the one word that jsonargparse reads."""
    base = name.partition(".")[0]
    if name != "config" and base not in hints:
        raise ValueError(unknown(name, list(hints)))
    hint = _hint(name, hints)
    if _listable(hint):
        return f"--{name}={'null' if values == ['null'] else json.dumps(_listed(values))}"
    if not values and _takes(hint, bool):
        return f"--{name}=true"
    if not values:
        raise ValueError(f"--{name} needs a value")
    if len(values) > 1:
        raise ValueError(f"--{name} takes one value, not {' '.join(values)!r}: quote it, or begin options with --")
    return f"--{name}={_as_json(name, values[0], hints=hints)}"


def _hint(name: str, hints: dict[str, Any]) -> Any:
    """The type of an option, of one inside a nested dataclass too; None where the class is the user's choice."""
    first, *rest = name.split(".")
    found = hints.get(first)
    for part in rest:
        found = get_type_hints(found).get(part) if dataclasses.is_dataclass(found) and isinstance(found, type) else None
    return found


def _as_json(name: str, value: str, *, hints: dict[str, Any]) -> str:
    if name == "config":
        return json.dumps(_checked(read_yaml(value), hints, source=value))
    if name in CLASS_KEYS or name.rpartition(".")[2] in OBJECTIVE_FIELDS:
        given = read_value(value, source=f"--{name}")
        return json.dumps(expand(given) if given is not None or name in CLASS_KEYS else None)
    if name.endswith(".parts"):
        return json.dumps(expand_parts(read_value(value, source=f"--{name}")))
    return value


def _checked(content: dict[str, Any], hints: dict[str, Any], *, source: str) -> dict[str, Any]:
    """The YAML's options, classes expanded; ValueError for an unknown key, or null where it is no value."""
    ready = {}
    for key, value in content.items():
        hint = hints.get(key)
        if key not in hints:
            raise ValueError(f"{source}: {unknown(key, list(hints))}")
        if value is None and hint is not Any and not _takes(hint, type(None)):
            raise ValueError(f"{source}: {key} is empty: give a value, or leave the line out")
        if isinstance(value, str) and _listable(hint):
            value = _listed([value])
        ready[key] = expand(value) if key in CLASS_KEYS else value
    return ready


def _listed(values: Sequence[str]) -> list[Any]:
    """``a,b``, ``a b`` and ``[a, b]`` are the same list."""
    if len(values) == 1 and values[0].startswith("["):
        return list(read_value(values[0], source="the list"))
    return [part for value in values for part in value.split(",") if part]


def _listable(hint: Any) -> bool:
    """Whether several words are its value."""
    return (_takes(hint, list) or _takes(hint, tuple)) and not _takes(hint, str)


def _takes(hint: Any, kind: type) -> bool:
    """Whether a type annotation allows values of ``kind``."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_takes(part, kind) for part in get_args(hint))
    return (get_origin(hint) or hint) is kind


def check_least(options: Any, least: Mapping[str, int]) -> None:
    """ValueError for the first of these options that is below its least value; None is no value."""
    for name, smallest in least.items():
        value = getattr(options, name)
        if value is not None and value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, not {value}")

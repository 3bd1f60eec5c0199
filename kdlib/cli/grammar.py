"""The one YAML grammar: flat keys, a class is ``Name`` or ``{Name: {field: value}}``, the same when typed.

jsonargparse does the parsing and the types; here its class_path and init_args are translated, both ways.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import re
import sys
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from kdlib.cli.names import unknown

CLASS_KEYS = ("objective",)
OBJECTIVE_FIELDS = ("divergence",)  # fields of objectives that are themselves objectives
USER_MODULE = "kdlib_user_"
_typed_as: dict[str, str] = {}  # the module of a user's file -> the path as it was typed


class _Loader(yaml.SafeLoader):
    """YAML where 1e-3 is a number, as everyone means it (YAML 1.1 wants 1.0e-3)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_value(text: str, *, source: str) -> Any:
    """YAML (or JSON) text as a value; ValueError with one line that names ``source``."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ValueError(f"{source}{where} is not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not YAML: {error}") from error


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file of options; ValueError with one line when it is not one."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration file {path}")
    content = read_value(Path(path).read_text(encoding="utf-8"), source=path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options as KEY: VALUE lines")
    return {str(key): value for key, value in content.items()}


def expand(spec: Any) -> Any:
    """A class as users write it -> jsonargparse's class_path and init_args.

    ``Name``, ``file.py:Name``, ``module:Name`` or ``{Name: {field: value}}``; also in the parts of a Sum. Fields that are not
    given have the class's defaults: jsonargparse would keep those that the class before it had under the same name.
    """
    if isinstance(spec, str):
        spec = {spec: None}
    if isinstance(spec, dict) and len(spec) == 1:
        name, given = next(iter(spec.items()))
        if isinstance(given, dict | None):
            path = _class_path(str(name))
            return {"class_path": path, "init_args": {**_defaults(path), **_expanded_fields(path, given or {})}}
    raise ValueError(f"a class is written as Name or {{Name: {{field: value}}}}, not as {spec}")


def _expanded_fields(path: str, given: dict[str, Any]) -> dict[str, Any]:
    known = class_fields(path)
    for key in given:
        if key not in known:
            raise ValueError(unknown(str(key), known, of=path.rsplit(".", 1)[1]))
    return {key: _expanded_field(key, value) for key, value in given.items()}


def _defaults(path: str) -> dict[str, Any]:
    """The defaults of a class's fields, those that are objectives expanded."""
    every = [field for field in _fields(path) if field.default is not MISSING]
    made = [field for field in _fields(path) if field.default_factory is not MISSING]
    found = {field.name: field.default for field in every}
    return found | {field.name: _written(field.default_factory()) for field in made}  # type: ignore[operator]


def _written(value: Any) -> Any:
    """An objective as its class and fields; other values as they are."""
    if not is_dataclass(value):
        return value
    written = {field.name: _written(getattr(value, field.name)) for field in fields(value)}
    return {"class_path": f"{type(value).__module__}.{type(value).__name__}", "init_args": written}


def _expanded_field(key: str, value: Any) -> Any:
    if key == "parts":
        return expand_parts(value)
    return expand(value) if key in OBJECTIVE_FIELDS and value is not None else value


def expand_parts(parts: Any) -> list[list[Any]]:
    """``[[weight, class], ...]``, the parts of a Sum, with the classes expanded."""
    if not isinstance(parts, list) or not all(isinstance(part, list) and len(part) == 2 for part in parts):
        raise ValueError(f"the parts of a Sum are written as [[weight, Name], ...], not as {parts}")
    return [[weight, expand(objective)] for weight, objective in parts]


def collapse(value: Any) -> Any:
    """The inverse of ``expand``, over a whole configuration."""
    if isinstance(value, dict) and "class_path" in value:
        module, _, name = value["class_path"].rpartition(".")
        given = {key: collapse(item) for key, item in (value.get("init_args") or {}).items()}
        shown = name if module.partition(".")[0] == "kdlib" else f"{_typed_as.get(module, module)}:{name}"
        return {shown: given} if given else shown
    if isinstance(value, dict):
        return {key: collapse(item) for key, item in value.items()}
    return [collapse(item) for item in value] if isinstance(value, list | tuple) else value


def objective_names(*, diffusion: bool | None = None) -> list[str]:
    """The objectives of kdlib.objectives, which need no module in front; of diffusion models alone or without them."""
    home = importlib.import_module("kdlib.objectives")
    found = {name: getattr(home, name) for name in home.__all__}
    names = [name for name, cls in found.items() if is_dataclass(cls) and not inspect.isabstract(cls)]
    return [name for name in names if diffusion in (None, issubclass(found[name], home.diffusion.DiffusionObjective))]


def class_fields(path: str) -> list[str]:
    """The option names of a dataclass given by its import path."""
    return [field.name for field in _fields(path)]


def _fields(path: str) -> tuple[Field[Any], ...]:
    module, _, name = path.rpartition(".")
    return fields(getattr(importlib.import_module(module), name))


def _class_path(name: str) -> str:
    if ":" in name:
        return _own_class_path(name)
    known = objective_names()
    if name in known:
        return f"kdlib.objectives.{name}"
    lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), lower, n=1)
    hint = f"did you mean {lower[near[0]]}?" if near else f"choose {', '.join(known)}"
    raise ValueError(f"no objective {name}: {hint} (one of your own is file.py:Name)")


def _own_class_path(name: str) -> str:
    source, _, attribute = name.rpartition(":")
    module = load_user_module(source)
    found = vars(module).get(attribute)
    base = importlib.import_module("kdlib.objectives").Objective
    if not (isinstance(found, type) and is_dataclass(found) and issubclass(found, base)):
        raise ValueError(f"{source} has no objective {attribute}: it is a frozen dataclass derived from RowObjective")
    return f"{module.__name__}.{attribute}"


def load_user_module(source: str) -> ModuleType:
    """A module by import name, or from a .py file."""
    try:
        return _load_file(source) if source.endswith(".py") else importlib.import_module(source)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever the user's own code raises
        raise ValueError(f"cannot import {source}: {type(error).__name__}: {error}") from error


def _load_file(source: str) -> ModuleType:
    path = Path(source).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"no file {source}")
    name = f"{USER_MODULE}{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name], _typed_as[name] = module, source
    spec.loader.exec_module(module)
    return module

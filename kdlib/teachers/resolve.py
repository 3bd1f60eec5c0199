"""From what users write for ``teacher`` to a Teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from kdlib.serving.client import is_url
from kdlib.teachers.cache import CachedTeacher
from kdlib.teachers.consistency import ConsistencyEnsemble
from kdlib.teachers.ensemble import EnsembleTeacher
from kdlib.teachers.hf import HFTeacher
from kdlib.teachers.routed import RoutedTeacher
from kdlib.teachers.self_teacher import SelfTeacher
from kdlib.types import Teacher


def resolve_teacher(spec: Any, options: Mapping[str, Any]) -> Teacher | None:
    """A Teacher from what users give.

    spec: a Hub id or model path, a directory made by ``kdlib cache``, the URL of a server or a list of URLs (its replicas),
    a loaded model, a Teacher, or None; "SelfTeacher"; a mapping: {EnsembleTeacher: {teachers: [...], weights: [...]}},
    {ConsistencyEnsemble: {teachers: [main, ...], top_k: 10, consistency: rbf, beta: 2}},
    {SelfTeacher: {kind: ema, decay: 0.999}}, or names of rows to teachers, {math: ..., code: ...}.
    options: how HFTeacher loads a path; ``served``: options of VLLMTeacher; ``backend``: "hf" or "vllm", what runs a path.
    Raises ValueError for what is none of these.
    """
    loading = {key: value for key, value in options.items() if key not in ("served", "backend")}
    if spec == "SelfTeacher":
        return SelfTeacher()
    if isinstance(spec, str):
        return _named(spec, options, loading)
    if isinstance(spec, nn.Module):
        return HFTeacher(spec)
    if isinstance(spec, Mapping):
        return _composed(spec, options)
    if isinstance(spec, Sequence):
        if not spec or not all(is_url(url) for url in spec):
            raise ValueError(
                "a list of teachers holds the URLs of one model's replicas: for different teachers give "
                "{EnsembleTeacher: {teachers: [...]}}, or {name: teacher} for rows with a `teacher` column"
            )
        return _served(list(spec), options)
    return spec


def leaves(teacher: Teacher | None) -> tuple[Teacher, ...]:
    """The teachers that an ensemble or a route is made of, however deep; a single teacher is its own leaf.

    So is a ConsistencyEnsemble: beside its main model it has models that speak other tokens.
    """
    if isinstance(teacher, EnsembleTeacher):
        return tuple(leaf for member in teacher.teachers for leaf in leaves(member))
    if isinstance(teacher, RoutedTeacher):
        return tuple(leaf for member in teacher.teachers.values() for leaf in leaves(member))
    return () if teacher is None else (teacher,)


def _named(name: str, options: Mapping[str, Any], loading: Mapping[str, Any]) -> Teacher:
    if is_url(name):
        return _served(name, options)
    if (Path(name) / "cache.json").is_file():
        return CachedTeacher(name)
    backend = options.get("backend", "hf")
    if backend == "vllm":
        return _served(name, options)
    if backend != "hf":
        raise ValueError(f"teacher_backend {backend!r}: a model's path is run by hf or by vllm")
    return HFTeacher(name, **loading)


def _served(source: str | list[str], options: Mapping[str, Any]) -> Teacher:
    from kdlib.teachers.vllm import VLLMTeacher  # reads nothing of vLLM until an engine is started

    return VLLMTeacher(source, **options.get("served") or {})


def _composed(spec: Mapping[str, Any], options: Mapping[str, Any]) -> Teacher:
    if list(spec) == ["SelfTeacher"]:
        return SelfTeacher(**_arguments("SelfTeacher", spec["SelfTeacher"], ("kind", "decay")))
    if list(spec) == ["EnsembleTeacher"]:
        given = _arguments("EnsembleTeacher", spec["EnsembleTeacher"], ("teachers", "weights"))
        return EnsembleTeacher(_members(given.pop("teachers", []), options), **given)
    if list(spec) == ["ConsistencyEnsemble"]:
        return _consistency(spec["ConsistencyEnsemble"], options)
    if {"SelfTeacher", "EnsembleTeacher", "ConsistencyEnsemble"} & spec.keys():
        alone = "ConsistencyEnsemble, EnsembleTeacher and SelfTeacher stand alone"
        raise ValueError(f"teacher has the keys {', '.join(spec)}: {alone}")
    return RoutedTeacher(dict(zip(spec, _members(list(spec.values()), options), strict=True)))


def _consistency(given: Any, options: Mapping[str, Any]) -> ConsistencyEnsemble:
    given = _arguments("ConsistencyEnsemble", given, ("teachers", "top_k", "consistency", "beta"))
    members = _members(given.pop("teachers", []), options, of="ConsistencyEnsemble")
    if not members:
        raise ValueError("ConsistencyEnsemble.teachers is empty: give the main teacher, then those that assist it")
    return ConsistencyEnsemble(members[0], members[1:], **given)  # type: ignore[arg-type]  # which it checks


def _members(specs: Any, options: Mapping[str, Any], *, of: str = "EnsembleTeacher") -> list[Teacher]:
    if isinstance(specs, str) or not isinstance(specs, Sequence):
        raise ValueError(f"{of}.teachers is a list of teachers, not {specs!r}")
    found = [resolve_teacher(spec, options) for spec in specs]
    if any(teacher is None for teacher in found):
        raise ValueError("a teacher among several is null: name a model, a cache, a URL or SelfTeacher")
    return [teacher for teacher in found if teacher is not None]


def _arguments(name: str, given: Any, known: tuple[str, ...]) -> dict[str, Any]:
    given = {} if given is None else given
    if not isinstance(given, Mapping) or set(given) - set(known):
        said = ", ".join(map(str, given)) if isinstance(given, Mapping) else repr(given)
        raise ValueError(f"teacher {name} takes {', '.join(known[:-1])} and {known[-1]}, not {said}")
    return dict(given)

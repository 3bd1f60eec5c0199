"""Under which licence a student may be published: read from the cards of what it was made of, quoted, never guessed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from httpx2 import HTTPError
from huggingface_hub import HfApi, RepoCard, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from yaml import YAMLError

from kdlib.data.cache.index import INDEX_FILE, CacheIndex
from kdlib.serving.client import is_url

CARD = "README.md"
FIELDS = ("license", "license_name", "license_link")
NO_MODELS = ("SelfTeacher",)  # a teacher that is the student
SETTINGS = ("weights", "top_k", "consistency", "beta", "kind", "decay")  # of the teachers that are made of others
SECONDS = 10.0  # that the Hub may take to say a licence


@dataclass(frozen=True, kw_only=True)
class License:
    """``name`` as the Hub writes it, ``quoted`` as it stands in the card ``source``."""

    name: str
    quoted: str
    source: str


def license_of(model: str) -> License | None:
    """What the card of a path or Hub id says, beside the model, in the Hub's cache or on the Hub; None for nothing."""
    path = Path(model)
    if is_url(model):
        return None
    if (path / INDEX_FILE).is_file():
        return license_of(CacheIndex.load(path).meta.teacher)
    if path.exists():
        return _of_file(path / CARD)
    try:
        cached = try_to_load_from_cache(model, CARD)
        found = _of_file(Path(cached)) if isinstance(cached, str) else None
        if found is not None or is_offline_mode():
            return found
        data = HfApi().model_info(model, timeout=SECONDS).card_data
        return None if data is None else _of_data(data.to_dict(), source=f"the card of {model} on the Hub")
    except (HTTPError, HFValidationError, OSError):
        return None


def teacher_names(teacher: Any) -> list[str]:
    """The paths, Hub ids and URLs in what a user gives as ``teacher``, however nested."""
    if isinstance(teacher, str):
        return [] if teacher in NO_MODELS else [teacher]
    if isinstance(teacher, Mapping):
        parts = [value for key, value in teacher.items() if key not in (*SETTINGS, *NO_MODELS)]
        return [name for part in parts for name in teacher_names(part)]
    if isinstance(teacher, Sequence):
        return [name for part in teacher for name in teacher_names(part)]
    return []


def licenses(names: Sequence[str]) -> dict[str, License | None]:
    """{model: its licence} of models given by path or Hub id."""
    return {name: license_of(name) for name in dict.fromkeys(names)}


def settled(given: str | None, found: Mapping[str, License | None]) -> str | None:
    """The licence of what is made of these models: as ``given``, else the one that all of them have, else None."""
    names = {None if one is None else one.name for one in found.values()}
    return given or (names.pop() if len(names) == 1 else None)


def check_license(given: str | None, found: Mapping[str, License | None]) -> str:
    """The licence to publish under; ValueError when it takes a person to say it."""
    name = settled(given, found)
    if name is not None:
        return name
    unknown = [model for model, one in found.items() if one is None]
    if unknown or not found:
        what = f"no licence is found for {', '.join(unknown)}" if unknown else "there is no model whose licence would hold"
        raise ValueError(f"{what}: read what its owner allows, and add --license NAME (such as apache-2.0) to push")
    said = ", ".join(f"{model}: {one.name}" for model, one in found.items() if one is not None)
    raise ValueError(f"the models have different licences ({said}): add --license NAME with the one that holds for the student")


def license_lines(found: Mapping[str, License | None]) -> list[str]:
    """A line for each model: the licence as its card has it, or that there is none."""
    return [
        f"- `{model}`: " + ("no licence was found in its card" if one is None else f"“{one.quoted}” ({one.source})")
        for model, one in found.items()
    ]


def _of_file(path: Path) -> License | None:
    if not path.is_file():
        return None
    try:
        return _of_data(RepoCard.load(path).data.to_dict(), source="the card beside it")
    except (YAMLError, ValueError):
        return None  # a card whose front matter nobody can read says nothing


def _of_data(data: Mapping[str, Any], *, source: str) -> License | None:
    if not data.get("license"):
        return None
    quoted = "; ".join(f"{name}: {data[name]}" for name in FIELDS if data.get(name))
    name = data["license"]
    return License(name=name if isinstance(name, str) else ", ".join(name), quoted=quoted, source=source)

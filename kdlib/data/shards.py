"""A directory of shards under one ``index.json``: what they depend on, which are there, and whether they are whole."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from kdlib.data.cache.reader import checksum, size_problem
from kdlib.files import write_whole

INDEX_FILE = "index.json"


@dataclass(frozen=True, kw_only=True)
class ShardFile:
    """A finished file, from ``prompts`` prompts."""

    file: str
    prompts: int
    bytes: int
    xxh3_128: str

    def problem(self, directory: Path) -> str | None:
        """What is wrong with the file, None for nothing."""
        path = directory / self.file
        found = size_problem(path, self.bytes)
        return "altered: its checksum differs" if found is None and checksum(path) != self.xxh3_128 else found


ShardT = TypeVar("ShardT", bound=ShardFile)


@dataclass(frozen=True, kw_only=True)
class ShardIndex(ABC, Generic[ShardT]):
    """``index.json``: ``settings``, everything that the shards depend on; ``prompts`` in all, ``shards`` by their number.

    Of a class: ``what`` the shards hold, the ``command`` that writes them, and the patterns of the ``files`` it writes, the
    index last; ``kind`` stands in the index, where there is one.
    """

    what: ClassVar[str]
    command: ClassVar[str]
    files: ClassVar[tuple[str, ...]]
    kind: ClassVar[str | None] = None
    format_version: ClassVar[int] = 1

    settings: Mapping[str, Any]
    prompts: int
    rows_per_shard: int
    shards: dict[int, ShardT]

    @staticmethod
    @abstractmethod
    def shard_of(content: Mapping[str, Any]) -> ShardT:
        """A shard from its JSON."""

    @property
    def totals(self) -> Mapping[str, Any]:
        """What the index holds beside the shards themselves."""
        return {}

    @property
    def n_shards(self) -> int:
        return -(-self.prompts // self.rows_per_shard)

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.n_shards

    def changes(self, settings: Mapping[str, Any]) -> list[str]:
        """``key: before -> now`` of every setting that differs."""
        return setting_changes(self.settings, settings)

    def check(self, directory: Path) -> None:
        """ValueError for shards that are not there yet, and for files that are missing, truncated or altered."""
        again = f"run the same `{self.command}` command again"
        if not self.complete:
            done = f"{len(self.shards)} of {self.n_shards} shards"
            raise ValueError(f"the {self.what} in {directory} are unfinished ({done}): {again} to continue")
        for shard in self.shards.values():
            if (problem := shard.problem(directory)) is not None:
                raise ValueError(f"{directory / shard.file} is {problem}: {again} to restore it")

    def save(self, directory: Path) -> None:
        """Rewrites index.json as a whole or not at all."""
        content = {
            **({} if self.kind is None else {"kind": self.kind}),
            "format_version": self.format_version,
            "complete": self.complete,
            "prompts": self.prompts,
            "rows_per_shard": self.rows_per_shard,
            "files": list(self.files),
            "settings": dict(self.settings),
            **self.totals,
            "shards": {str(number): asdict(self.shards[number]) for number in sorted(self.shards)},
        }
        write_whole(directory / INDEX_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: Path) -> Self:
        """Raises FileNotFoundError without an index.json, ValueError for one that this version cannot read."""
        path = directory / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no {INDEX_FILE}: write {cls.what} with `{cls.command}`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            cls._check_readable(path, kind=content.get("kind"), version=content["format_version"])
            return cls(
                settings=content["settings"],
                prompts=content["prompts"],
                rows_per_shard=content["rows_per_shard"],
                shards={int(number): cls.shard_of(shard) for number, shard in content["shards"].items()},
            )
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): write the {cls.what} again with --overwrite true") from error

    @classmethod
    def _check_readable(cls, path: Path, *, kind: str | None, version: int) -> None:
        if kind != cls.kind:
            raise ValueError(
                f"{path} is not of {cls.what} that {cls.command} writes: choose another directory, or add --overwrite true"
            )
        if version != cls.format_version:
            raise ValueError(f"{path} has format {version}, this kdlib reads {cls.format_version}: write the {cls.what} again")


def kind_of(directory: Path) -> str | None:
    """The ``kind`` that a directory's index.json names; None where there is none, or no readable index."""
    kind = _index(directory).get("kind")
    return kind if isinstance(kind, str) else None


def written_files(directory: Path) -> tuple[str, ...]:
    """The patterns of the files under a directory's index, of whatever kind it is; none for an index that is not ours."""
    index = _index(directory)
    ours = {"format_version", "rows_per_shard", "shards", "files"} <= index.keys()
    return tuple(Path(pattern).name for pattern in index["files"]) if ours else ()


def _index(directory: Path) -> Mapping[str, Any]:
    try:
        content = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def setting_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """``key: before -> now`` of every setting that differs."""
    pairs = [(key, before.get(key), now.get(key)) for key in dict.fromkeys([*before, *now])]
    return [f"{key}: {_shown(old)} -> {_shown(new)}" for key, old, new in pairs if old != new]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

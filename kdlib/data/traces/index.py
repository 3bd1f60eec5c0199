"""``index.json``: what the traces in a directory are made of, and which shards are safely on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlib.files import write_whole

INDEX_FILE = "index.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A completion that was generated and not kept: why, and how many tokens it cost."""

    prompt_id: int
    generation: int
    reason: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished file of traces: those of ``prompts`` prompts."""

    file: str
    prompts: int
    traces: int
    bytes: int
    xxh3_128: str
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, kw_only=True)
class TraceIndex:
    """``settings``: everything that the traces depend on; ``prompts`` in all, ``shards`` by their number."""

    settings: Mapping[str, Any]
    prompts: int
    rows_per_shard: int
    shards: dict[int, Shard]

    @property
    def n_shards(self) -> int:
        return -(-self.prompts // self.rows_per_shard)

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.n_shards

    def save(self, directory: Path) -> None:
        """Rewrites index.json as a whole or not at all."""
        content = {
            "format_version": FORMAT_VERSION,
            "complete": self.complete,
            "prompts": self.prompts,
            "rows_per_shard": self.rows_per_shard,
            "settings": dict(self.settings),
            "shards": {str(number): asdict(self.shards[number]) for number in sorted(self.shards)},
        }
        write_whole(directory / INDEX_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(directory: Path) -> TraceIndex:
        """Raises FileNotFoundError without an index.json, ValueError for one that this version cannot read."""
        path = directory / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no {INDEX_FILE}: write traces with `kdlib generate`")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version = content["format_version"]
            shards = {int(number): _shard(shard) for number, shard in content["shards"].items()}
            made = TraceIndex(
                settings=content["settings"],
                prompts=content["prompts"],
                rows_per_shard=content["rows_per_shard"],
                shards=shards,
            )
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}): generate again with --overwrite true") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{directory} has trace format {version}, this kdlib reads {FORMAT_VERSION}: generate again")
        return made

    def changes(self, settings: Mapping[str, Any]) -> list[str]:
        """``key: before -> now`` of every setting that differs."""
        keys = [*self.settings, *(key for key in settings if key not in self.settings)]
        pairs = [(key, self.settings.get(key), settings.get(key)) for key in keys]
        return [f"{key}: {_shown(before)} -> {_shown(now)}" for key, before, now in pairs if before != now]


def _shard(content: Mapping[str, Any]) -> Shard:
    return Shard(**{**content, "skipped": tuple(Skipped(**skipped) for skipped in content["skipped"])})


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

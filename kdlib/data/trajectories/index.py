"""``index.json``: what the trajectories in a directory are made of, and which shards are safely on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlib.data.cache.reader import checksum, size_problem
from kdlib.files import write_whole

INDEX_FILE, KIND = "index.json", "jacobi trajectories"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished file, from ``prompts`` prompts.

    ``blocks`` were kept, with ``tokens`` of y*, ``states`` and ``iterations`` (passes until each was stable) in all. Over all
    blocks, dropped ones too: ``forwards`` passes were made, ``block_by_block`` would have been by one block at a time.
    ``dropped_rows`` and ``dropped_blocks``: how many, by reason.
    """

    file: str
    prompts: int
    rows: int
    blocks: int
    tokens: int
    states: int
    iterations: int
    forwards: int
    block_by_block: int
    bytes: int
    xxh3_128: str
    dropped_rows: Mapping[str, int]
    dropped_blocks: Mapping[str, int]

    def problem(self, directory: Path) -> str | None:
        """What is wrong with the file, None for nothing."""
        path = directory / self.file
        found = size_problem(path, self.bytes)
        return "altered: its checksum differs" if found is None and checksum(path) != self.xxh3_128 else found


SUMMED = ("prompts", "rows", "blocks", "tokens", "states", "iterations", "forwards", "block_by_block", "bytes")


@dataclass(frozen=True, kw_only=True)
class TrajectoryIndex:
    """``settings``: everything that the trajectories depend on; ``prompts`` in all, ``shards`` by their number."""

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

    @property
    def summary(self) -> dict[str, Any]:
        """Totals over the shards, by the names of their fields."""
        totals: dict[str, Any] = {name: sum(getattr(shard, name) for shard in self.shards.values()) for name in SUMMED}
        totals["dropped_rows"] = _added(shard.dropped_rows for shard in self.shards.values())
        totals["dropped_blocks"] = _added(shard.dropped_blocks for shard in self.shards.values())
        return totals

    def changes(self, settings: Mapping[str, Any]) -> list[str]:
        """``key: before -> now`` of every setting that differs."""
        keys = dict.fromkeys([*self.settings, *settings])
        return [f"{k}: {self.settings.get(k)} -> {settings.get(k)}" for k in keys if self.settings.get(k) != settings.get(k)]

    def save(self, directory: Path) -> None:
        """Rewrites index.json as a whole or not at all."""
        content = {
            "kind": KIND,
            "format_version": FORMAT_VERSION,
            "complete": self.complete,
            "prompts": self.prompts,
            "rows_per_shard": self.rows_per_shard,
            "settings": dict(self.settings),
            "summary": self.summary,
            "shards": {str(number): asdict(self.shards[number]) for number in sorted(self.shards)},
        }
        write_whole(directory / INDEX_FILE, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @staticmethod
    def load(directory: Path) -> TrajectoryIndex:
        """Raises FileNotFoundError without an index.json, ValueError for one that this version cannot read."""
        path = directory / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no {INDEX_FILE}: write trajectories with `kdlib trajectories jacobi`")
        if not is_trajectories(directory):
            raise ValueError(f"{path} is not of trajectories, or damaged: choose another directory, or add --overwrite true")
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format_version"] != FORMAT_VERSION:
            version = content["format_version"]
            raise ValueError(f"{directory} has trajectory format {version}, this kdlib reads {FORMAT_VERSION}: write it again")
        return TrajectoryIndex(
            settings=content["settings"],
            prompts=content["prompts"],
            rows_per_shard=content["rows_per_shard"],
            shards={int(number): Shard(**shard) for number, shard in content["shards"].items()},
        )


def is_trajectories(directory: str | Path) -> bool:
    """Whether a directory holds trajectories, finished or not."""
    path = Path(directory) / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and content.get("kind") == KIND


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for some in counts:
        total.update(some)
    return dict(total.most_common())

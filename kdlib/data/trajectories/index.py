"""What the trajectories in a directory are made of, and which shards are safely on disk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from kdlib.data.shards import INDEX_FILE, ShardFile, ShardIndex

KIND = "jacobi trajectories"


@dataclass(frozen=True, kw_only=True)
class Shard(ShardFile):
    """A finished file of trajectories.

    ``blocks`` were kept, with ``tokens`` of y*, ``states`` and ``iterations`` (passes until each was stable) in all. Over all
    blocks, dropped ones too: ``forwards`` passes were made, ``block_by_block`` would have been by one block at a time.
    ``dropped_rows`` and ``dropped_blocks``: how many, by reason.
    """

    rows: int
    blocks: int
    tokens: int
    states: int
    iterations: int
    forwards: int
    block_by_block: int
    dropped_rows: Mapping[str, int]
    dropped_blocks: Mapping[str, int]


SUMMED = ("prompts", "rows", "blocks", "tokens", "states", "iterations", "forwards", "block_by_block", "bytes")


@dataclass(frozen=True, kw_only=True)
class TrajectoryIndex(ShardIndex[Shard]):
    """The index of ``kdlib trajectories jacobi``."""

    what: ClassVar[str] = "trajectories"
    command: ClassVar[str] = "kdlib trajectories jacobi"
    files: ClassVar[tuple[str, ...]] = ("shard-*.parquet*", INDEX_FILE + "*")
    kind: ClassVar[str | None] = KIND

    @staticmethod
    def shard_of(content: Mapping[str, Any]) -> Shard:
        return Shard(**content)

    @property
    def totals(self) -> Mapping[str, Any]:
        return {"summary": self.summary}

    @property
    def summary(self) -> dict[str, Any]:
        """Totals over the shards, by the names of their fields."""
        totals: dict[str, Any] = {name: sum(getattr(shard, name) for shard in self.shards.values()) for name in SUMMED}
        totals["dropped_rows"] = _added(shard.dropped_rows for shard in self.shards.values())
        totals["dropped_blocks"] = _added(shard.dropped_blocks for shard in self.shards.values())
        return totals


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

"""What the traces in a directory are made of, and which shards are safely on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kdlib.data.shards import INDEX_FILE, ShardFile, ShardIndex


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A completion that was generated and not kept: why, and how many tokens it cost."""

    prompt_id: int
    generation: int
    reason: str
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Shard(ShardFile):
    """A finished file of traces."""

    traces: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True, kw_only=True)
class TraceIndex(ShardIndex[Shard]):
    """The index of ``kdlib generate``."""

    what: ClassVar[str] = "traces"
    command: ClassVar[str] = "kdlib generate"
    files: ClassVar[tuple[str, ...]] = (
        *("shard-*.jsonl*", "correct.jsonl*", "incorrect.jsonl*", "report.*", "metrics.jsonl"),
        INDEX_FILE + "*",
    )

    @staticmethod
    def shard_of(content: Mapping[str, Any]) -> Shard:
        return Shard(**{**content, "skipped": tuple(Skipped(**skipped) for skipped in content["skipped"])})

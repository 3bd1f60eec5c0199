"""Reading traces: every shard checked, then line by line."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from kdlib.data.traces.index import Shard, TraceIndex


def shard_file(number: int) -> str:
    return f"shard-{number:05d}.jsonl"


def read_traces(directory: str | Path) -> Iterator[dict[str, Any]]:
    """The traces of a directory, shard by shard; ValueError for one that is unfinished, or a file that was altered."""
    directory = Path(directory)
    index = TraceIndex.load(directory)
    if not index.complete:
        raise ValueError(f"the traces in {directory} are unfinished: run the same `kdlib generate` command again to continue")
    for shard in index.shards.values():
        problem = damage(directory, shard)
        if problem is not None:
            raise ValueError(
                f"{directory / shard.file} is {problem}: run the same `kdlib generate` command again to restore it"
            )
        with (directory / shard.file).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def damage(directory: Path, shard: Shard) -> str | None:
    """What is wrong with a shard's file, None for nothing."""
    path = directory / shard.file
    if not path.is_file():
        return "missing"
    if path.stat().st_size != shard.bytes:
        return f"truncated or altered: {path.stat().st_size} bytes instead of {shard.bytes}"
    with path.open("rb") as file:
        return (
            None
            if hashlib.file_digest(file, xxhash.xxh3_128).hexdigest() == shard.xxh3_128
            else "altered: its checksum differs"
        )

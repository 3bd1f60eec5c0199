"""Reading traces: every shard checked, then line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdlib.data.traces.index import TraceIndex


def read_traces(directory: str | Path) -> Iterator[dict[str, Any]]:
    """The traces of a directory, shard by shard; ValueError for one that is unfinished, or a file that was altered."""
    directory = Path(directory)
    index = TraceIndex.load(directory)
    index.check(directory)
    for shard in index.shards.values():
        with (directory / shard.file).open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)

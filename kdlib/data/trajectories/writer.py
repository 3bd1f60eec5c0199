"""Writing Jacobi trajectories shard by shard, so that an interrupted run loses one shard at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from kdlib.data.trajectories.index import Shard, TrajectoryIndex
from kdlib.data.trajectories.table import RowWriter

_LISTS = ("input_ids", "labels", "block", "states", "changed", "changed_position", "changed_token", "reference_ids")
SCHEMA = pa.schema(
    {
        **{name: pa.list_(pa.int32()) for name in _LISTS},
        "sample_id": pa.int64(),
        "prompt_length": pa.int32(),
        "block_size": pa.int32(),
    }
)


@dataclass(frozen=True, kw_only=True)
class Written:
    """What came of a shard's prompts: rows of ``encoded_row``, and the counts of ``Shard``."""

    rows: Sequence[Mapping[str, Any]]
    tokens: int
    iterations: int
    forwards: int
    block_by_block: int
    dropped_rows: Mapping[str, int] = field(default_factory=dict)
    dropped_blocks: Mapping[str, int] = field(default_factory=dict)


class TrajectoryWriter(RowWriter[TrajectoryIndex]):
    """Shard i holds the rows of ``prompts(i)``; each is written atomically, then listed in index.json."""

    index_class = TrajectoryIndex
    schema = SCHEMA

    def write(self, shard: int, written: Written) -> None:
        """Writes the shard's file and lists it; both are safe on disk on return."""
        self.index.shards[shard] = Shard(
            **self.put(shard, written.rows),
            blocks=sum(len(row["block"]) for row in written.rows),
            tokens=written.tokens,
            states=sum(sum(row["states"]) for row in written.rows),
            iterations=written.iterations,
            forwards=written.forwards,
            block_by_block=written.block_by_block,
            dropped_rows=dict(written.dropped_rows),
            dropped_blocks=dict(written.dropped_blocks),
        )
        self.index.save(self.directory)

"""Writing trajectories shard by shard, so that an interrupted run loses one shard at most."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kdlib.data.trajectories.index import INDEX_FILE, Shard, TrajectoryIndex
from kdlib.files import write_whole

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


class TrajectoryWriter:
    """Shard i holds the rows of ``prompts(i)``; each is written atomically, then listed in index.json.

    A directory with trajectories of the same ``settings`` is continued: ``missing`` names the shards still to write,
    ``damaged`` those among them whose file was there. Raises ValueError naming the changed settings otherwise, and for a
    directory of something else.
    """

    def __init__(
        self,
        directory: str | Path,
        settings: Mapping[str, Any],
        *,
        prompts: int,
        rows_per_shard: int,
        overwrite: bool = False,
    ) -> None:
        self.directory = Path(directory)
        _check_directory(self.directory)
        if overwrite:
            _delete(self.directory)
        shards = _earlier(self.directory, settings)
        self.damaged = {number: found for number, shard in shards.items() if (found := shard.problem(self.directory))}
        whole = {number: shard for number, shard in shards.items() if number not in self.damaged}
        self.index = TrajectoryIndex(settings=settings, prompts=prompts, rows_per_shard=rows_per_shard, shards=whole)
        self.index.save(self.directory)

    @property
    def missing(self) -> list[int]:
        """The shards still to be written, in order."""
        return [i for i in range(self.index.n_shards) if i not in self.index.shards]

    def prompts(self, shard: int) -> range:
        """The prompts of a shard."""
        start = shard * self.index.rows_per_shard
        return range(start, min(start + self.index.rows_per_shard, self.index.prompts))

    def write(self, shard: int, written: Written) -> None:
        """Writes the shard's file and lists it; both are safe on disk on return."""
        file = f"shard-{shard:05d}.parquet"
        content = _parquet(written.rows)
        write_whole(self.directory / file, content)
        self.index.shards[shard] = Shard(
            file=file,
            prompts=len(self.prompts(shard)),
            rows=len(written.rows),
            blocks=sum(len(row["block"]) for row in written.rows),
            tokens=written.tokens,
            states=sum(sum(row["states"]) for row in written.rows),
            iterations=written.iterations,
            forwards=written.forwards,
            block_by_block=written.block_by_block,
            bytes=len(content),
            xxh3_128=xxhash.xxh3_128_hexdigest(content),
            dropped_rows=dict(written.dropped_rows),
            dropped_blocks=dict(written.dropped_blocks),
        )
        self.index.save(self.directory)


def _parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=SCHEMA), buffer, compression="zstd")
    return buffer.getvalue()


def _check_directory(directory: Path) -> None:
    """ValueError where trajectories would be written among other files."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir {directory} is a file: choose a directory")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / INDEX_FILE).is_file():
        raise ValueError(f"{directory} is not empty and holds no trajectories: choose another output_dir")


def _earlier(directory: Path, settings: Mapping[str, Any]) -> Mapping[int, Shard]:
    """The finished shards of an earlier run with the same settings."""
    if not (directory / INDEX_FILE).is_file():
        return {}
    held = TrajectoryIndex.load(directory)
    if changed := held.changes(settings):
        raise ValueError(
            f"{directory} holds trajectories made with other options ({'; '.join(changed)}): type them as they were to "
            "continue, choose another output_dir, or add --overwrite true"
        )
    return held.shards


def _delete(directory: Path) -> None:
    """Only what a run writes; the index goes last, so that a stop in between leaves a directory that is known."""
    for pattern in ("shard-*.parquet*", INDEX_FILE + "*"):
        for path in directory.glob(pattern):
            path.unlink()

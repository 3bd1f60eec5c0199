"""What trajectories of every kind share on disk: parquet shards of token rows, their counts, the check before reading."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from datasets import Dataset, load_dataset

from kdlib.data.shard_writer import ShardWriter
from kdlib.data.shards import INDEX_FILE, ShardFile, ShardIndex, kind_of
from kdlib.files import write_whole
from kdlib.tokenizers.identity import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JACOBI, DIFFUSION = "jacobi trajectories", "diffusion trajectories"


@dataclass(frozen=True, kw_only=True)
class RowShard(ShardFile):
    """A finished file of ``rows``; ``dropped_rows``: how many of its prompts gave none, by reason."""

    rows: int
    dropped_rows: Mapping[str, int]


RowShardT = TypeVar("RowShardT", bound=RowShard)


@dataclass(frozen=True, kw_only=True)
class RowIndex(ShardIndex[RowShardT], ABC):
    """An index whose ``settings`` name the ``model`` and the ``tokenizer`` of the rows.

    Of a class: the fields of its shards that are ``summed``, and those that are ``merged`` from counts by reason.
    """

    what: ClassVar[str] = "trajectories"
    files: ClassVar[tuple[str, ...]] = ("shard-*.parquet*", INDEX_FILE + "*")
    summed: ClassVar[tuple[str, ...]] = ("prompts", "rows", "bytes")
    merged: ClassVar[tuple[str, ...]] = ("dropped_rows",)

    @property
    def totals(self) -> Mapping[str, Any]:
        return {"summary": self.summary}

    @property
    def summary(self) -> dict[str, Any]:
        """Totals over the shards, by the names of their fields."""
        totals: dict[str, Any] = {name: sum(getattr(shard, name) for shard in self.shards.values()) for name in self.summed}
        return totals | {name: _added(getattr(shard, name) for shard in self.shards.values()) for name in self.merged}


IndexT = TypeVar("IndexT", bound=RowIndex[Any])


class RowWriter(ShardWriter[IndexT], ABC):
    """Shard i holds the rows of ``prompts(i)``, in the columns of ``schema``."""

    schema: ClassVar[pa.Schema]

    @abstractmethod
    def write(self, shard: int, written: Any) -> None:
        """Writes the shard's file and lists it; both are safe on disk on return."""

    def put(self, shard: int, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Writes the shard's file, whole or not at all, and returns what every RowShard says of it but ``dropped_rows``."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(list(rows), schema=self.schema), buffer, compression="zstd")
        file, content = f"shard-{shard:05d}.parquet", buffer.getvalue()
        write_whole(self.directory / file, content)
        checksum = xxhash.xxh3_128_hexdigest(content)
        counts = {"prompts": len(self.prompts(shard)), "rows": len(rows), "bytes": len(content)}
        return {"file": file, **counts, "xxh3_128": checksum}


def is_trajectories(directory: str | Path) -> bool:
    """Whether a directory holds trajectories of any kind, finished or not."""
    return kind_of(Path(directory)) in (JACOBI, DIFFUSION)


def read_table(
    index_class: type[RowIndex[Any]],
    directory: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    split: str = "train",
) -> Dataset:
    """The rows of a finished directory of this kind; ``split`` may be a slice, "train[:100]".

    Raises FileNotFoundError where there are none; ValueError for what is unfinished, truncated or altered, for no rows at all,
    and when ``tokenizer`` is not the one they were written with.
    """
    directory = Path(directory)
    index = index_class.load(directory)
    index.check(directory)
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != index.settings["tokenizer"]:
        raise ValueError(
            f"the trajectories in {directory} were written with another tokenizer, by {index.settings['model']}: "
            "train that model, or write trajectories with yours"
        )
    if not index.summary["rows"]:
        raise ValueError(f"no row of the trajectories in {directory} was kept: {index.summary['dropped_rows']}")
    files = [str(directory / shard.file) for shard in index.shards.values() if shard.rows]
    found: Dataset = load_dataset("parquet", data_files=files, split=split)
    return found


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for some in counts:
        total.update(some)
    return dict(total.most_common())

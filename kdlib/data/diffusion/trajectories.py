"""Trajectories of a diffusion language model on disk: final tokens, and the step in which each was committed.

A state of the decoding follows from these two: at step k a token is there when its step is at most k, else it is MASK.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa
from datasets import Dataset

from kdlib.data.draft import UNSCORED, sample_id
from kdlib.data.trajectories.table import DIFFUSION, RowIndex, RowShard, RowWriter, read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "labels": pa.list_(pa.int32()),
        "sample_id": pa.int64(),
        "prompt_length": pa.int32(),
        "commit_step": pa.list_(pa.int32()),
        "block_length": pa.int32(),
        "forwards": pa.int32(),
    }
)


def trajectory_row(
    prompt: Sequence[int], response: Sequence[int], *, commit_step: Sequence[int], block_length: int, forwards: int
) -> dict[str, Any]:
    """A row of the table, all columns: ``response`` with its end token, and the step, from 1, of each of its tokens."""
    ids, labels = [*prompt, *response], [UNSCORED] * len(prompt) + list(response)
    return {
        "input_ids": ids,
        "labels": labels,
        "sample_id": sample_id(ids, labels),
        "prompt_length": len(prompt),
        "commit_step": list(commit_step),
        "block_length": block_length,
        "forwards": forwards,
    }


@dataclass(frozen=True, kw_only=True)
class DiffusionShard(RowShard):
    """A finished file of trajectories.

    Of the rows kept: ``tokens`` before the end token and ``forwards`` passes in all, and how many each attempt gave,
    ``kept_at``. Of all attempts, failed ones too: ``attempts`` and their passes, ``spent``.
    """

    tokens: int
    forwards: int
    attempts: int
    spent: int
    kept_at: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class DiffusionIndex(RowIndex[DiffusionShard]):
    """The index of ``kdlib trajectories diffusion``."""

    command: ClassVar[str] = "kdlib trajectories diffusion"
    what: ClassVar[str] = "diffusion trajectories"
    kind: ClassVar[str | None] = DIFFUSION
    summed: ClassVar[tuple[str, ...]] = ("prompts", "rows", "tokens", "forwards", "attempts", "spent", "bytes")
    merged: ClassVar[tuple[str, ...]] = ("kept_at", "dropped_rows")

    @staticmethod
    def shard_of(content: Mapping[str, Any]) -> DiffusionShard:
        return DiffusionShard(**content)


@dataclass(frozen=True, kw_only=True)
class DiffusionWritten:
    """What came of a shard's prompts: rows of ``trajectory_row``, and the counts of ``DiffusionShard``."""

    rows: Sequence[Mapping[str, Any]]
    tokens: int
    attempts: int
    spent: int
    kept_at: Mapping[str, int] = field(default_factory=dict)
    dropped_rows: Mapping[str, int] = field(default_factory=dict)


class DiffusionWriter(RowWriter[DiffusionIndex]):
    """Shard i holds the rows of ``prompts(i)``; each is written atomically, then listed in index.json."""

    index_class = DiffusionIndex
    schema = SCHEMA

    def write(self, shard: int, written: DiffusionWritten) -> None:
        """Writes the shard's file and lists it; both are safe on disk on return."""
        self.index.shards[shard] = DiffusionShard(
            **self.put(shard, written.rows),
            tokens=written.tokens,
            forwards=sum(row["forwards"] for row in written.rows),
            attempts=written.attempts,
            spent=written.spent,
            kept_at=dict(written.kept_at),
            dropped_rows=dict(written.dropped_rows),
        )
        self.index.save(self.directory)


def read_diffusion_trajectories(
    directory: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, split: str = "train"
) -> Dataset:
    """The rows of a finished directory, columns as ``trajectory_row`` makes them; options and errors: ``read_table``."""
    return read_table(DiffusionIndex, directory, tokenizer=tokenizer, split=split)

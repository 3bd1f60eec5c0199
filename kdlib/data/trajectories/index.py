"""What the Jacobi trajectories in a directory are made of, and which shards are safely on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from kdlib.data.trajectories.table import JACOBI, RowIndex, RowShard


@dataclass(frozen=True, kw_only=True)
class Shard(RowShard):
    """A finished file of trajectories.

    ``blocks`` were kept, with ``tokens`` of y*, ``states`` and ``iterations`` (passes until each was stable) in all. Over all
    blocks, dropped ones too: ``forwards`` passes were made, ``block_by_block`` would have been by one block at a time.
    ``dropped_blocks``: how many, by reason.
    """

    blocks: int
    tokens: int
    states: int
    iterations: int
    forwards: int
    block_by_block: int
    dropped_blocks: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class TrajectoryIndex(RowIndex[Shard]):
    """The index of ``kdlib trajectories jacobi``."""

    command: ClassVar[str] = "kdlib trajectories jacobi"
    kind: ClassVar[str | None] = JACOBI
    summed: ClassVar[tuple[str, ...]] = (
        *("prompts", "rows", "blocks", "tokens", "states"),
        *("iterations", "forwards", "block_by_block", "bytes"),
    )
    merged: ClassVar[tuple[str, ...]] = ("dropped_rows", "dropped_blocks")

    @staticmethod
    def shard_of(content: Mapping[str, Any]) -> Shard:
        return Shard(**content)

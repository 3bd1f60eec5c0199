"""Rows with stored trajectories -> a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdlib.data.collate import DistillationCollator
from kdlib.data.jacobi.states import Block, RowStates
from kdlib.data.trajectories.codec import block_states


@dataclass(frozen=True)
class JacobiCollator(DistillationCollator):
    """A DistillationCollator that adds ``trajectory``, a list of one RowStates per row.

    ``stored``: rows are those of ``read_trajectories``, and their states are read; else they have none yet.
    """

    stored: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {**super().__call__(rows), "trajectory": [_row_states(row, stored=self.stored) for row in rows]}


def _row_states(row: Mapping[str, Any], *, stored: bool) -> RowStates:
    reference = tuple(row.get("reference_ids", ()))
    if not stored:
        return RowStates(blocks=(), reference=reference)
    start = row["prompt_length"]
    blocks = tuple(
        Block(number=number, start=start + number * row["block_size"], states=block_states(row, index))
        for index, number in enumerate(row["block"])
    )
    return RowStates(blocks=blocks, reference=reference)

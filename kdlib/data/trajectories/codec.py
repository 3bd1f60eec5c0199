"""Trajectories as flat columns of a row, and back: a state is what differs from the block it converges to.

For each kept block, in order, ``states`` has its number of states and ``changed``, for each of these, the number of places
where it differs from y*; ``changed_position`` and ``changed_token`` are those places in the block and what stands there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdlib.data.draft import UNSCORED, sample_id


@dataclass(frozen=True, kw_only=True)
class BlockTrajectory:
    """Block ``number`` of a row and its ``states`` [K, v]: the initial one first, y* last."""

    number: int
    states: NDArray


def encoded_row(
    prompt: Sequence[int],
    completion: Sequence[int],
    *,
    block_size: int,
    blocks: Sequence[BlockTrajectory],
    reference: Sequence[int] = (),
) -> dict[str, Any]:
    """A row of the table, all columns, from ``prompt``, y* = ``completion`` and the kept ``blocks``."""
    ids, labels = [*prompt, *completion], [UNSCORED] * len(prompt) + list(completion)
    differs = [block.states != block.states[-1] for block in blocks]
    changed = [where.sum(1) for where in differs]
    positions = [where.nonzero()[1] for where in differs]
    tokens = [block.states[where] for block, where in zip(blocks, differs, strict=True)]
    return {
        "input_ids": ids,
        "labels": labels,
        "sample_id": sample_id(ids, labels),
        "prompt_length": len(prompt),
        "block_size": block_size,
        "block": [block.number for block in blocks],
        "states": [len(block.states) for block in blocks],
        "changed": _joined(changed),
        "changed_position": _joined(positions),
        "changed_token": _joined(tokens),
        "reference_ids": list(reference),
    }


def block_states(row: Mapping[str, Any], number: int) -> NDArray:
    """The states [K, v] int32 of the row's kept block ``number`` (index into ``block``); v: its length."""
    counts, first = _counts(row, number)
    rest = slice(first, first + int(counts.sum()))
    states = np.tile(_target(row, number), (len(counts), 1))
    position, token = (np.asarray(row[name][rest], np.int32) for name in ("changed_position", "changed_token"))
    states[np.repeat(np.arange(len(counts)), counts), position] = token
    return states


def _counts(row: Mapping[str, Any], number: int) -> tuple[NDArray, int]:
    """How many places of each of a block's states are changed, and how many are in the blocks before it."""
    start = int(np.sum(row["states"][:number], dtype=np.int64))
    changed = np.asarray(row["changed"], np.int64)
    return changed[start : start + row["states"][number]], int(changed[:start].sum())


def _target(row: Mapping[str, Any], number: int) -> NDArray:
    start = row["prompt_length"] + row["block"][number] * row["block_size"]
    return np.asarray(row["input_ids"][start : start + row["block_size"]], np.int32)


def _joined(parts: Sequence[NDArray]) -> list[int]:
    return [int(x) for part in parts for x in part]

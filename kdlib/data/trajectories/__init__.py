"""Jacobi trajectories of greedy outputs on disk: parquet shards of rows, their states as what differs from the output.

Importing this package loads nothing heavy: each name is fetched from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

if TYPE_CHECKING:
    from kdlib.data.trajectories.codec import BlockTrajectory, block_states, encoded_row
    from kdlib.data.trajectories.index import Shard, TrajectoryIndex
    from kdlib.data.trajectories.reader import read_trajectories
    from kdlib.data.trajectories.table import is_trajectories
    from kdlib.data.trajectories.writer import TrajectoryWriter, Written

_HOME = {
    "BlockTrajectory": "codec",
    "Shard": "index",
    "TrajectoryIndex": "index",
    "TrajectoryWriter": "writer",
    "Written": "writer",
    "block_states": "codec",
    "encoded_row": "codec",
    "is_trajectories": "table",
    "read_trajectories": "reader",
}

__all__ = [
    "BlockTrajectory",
    "Shard",
    "TrajectoryIndex",
    "TrajectoryWriter",
    "Written",
    "block_states",
    "encoded_row",
    "is_trajectories",
    "read_trajectories",
]

__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})

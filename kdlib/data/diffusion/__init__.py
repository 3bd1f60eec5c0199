"""Diffusion language models' rows: a batch with learnt padding, and the trajectories that a teacher's decoding leaves.

Importing this package loads nothing heavy: each name is fetched from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

if TYPE_CHECKING:
    from kdlib.data.diffusion.collate import DiffusionCollator
    from kdlib.data.diffusion.trajectories import (
        DiffusionIndex,
        DiffusionShard,
        DiffusionWriter,
        DiffusionWritten,
        read_diffusion_trajectories,
        trajectory_row,
    )

_HOME = {
    "DiffusionCollator": "collate",
    "DiffusionIndex": "trajectories",
    "DiffusionShard": "trajectories",
    "DiffusionWriter": "trajectories",
    "DiffusionWritten": "trajectories",
    "read_diffusion_trajectories": "trajectories",
    "trajectory_row": "trajectories",
}

__all__ = [
    "DiffusionCollator",
    "DiffusionIndex",
    "DiffusionShard",
    "DiffusionWriter",
    "DiffusionWritten",
    "read_diffusion_trajectories",
    "trajectory_row",
]

__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})

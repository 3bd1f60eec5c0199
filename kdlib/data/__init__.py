"""Rows of a dataset -> token rows -> batches.

Importing this package loads nothing heavy: each name is fetched from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

if TYPE_CHECKING:
    from kdlib.data.collate import DistillationCollator
    from kdlib.data.draft import sample_id
    from kdlib.data.load import load_rows
    from kdlib.data.positions import causal_positions, teacher_inputs
    from kdlib.data.preview import preview_rows
    from kdlib.data.rollout_rows import prompt_ids, with_completion
    from kdlib.data.rows import Prepared, prepare_dataset

_HOME = {
    "DistillationCollator": "collate",
    "Prepared": "rows",
    "causal_positions": "positions",
    "load_rows": "load",
    "prepare_dataset": "rows",
    "preview_rows": "preview",
    "prompt_ids": "rollout_rows",
    "sample_id": "draft",
    "teacher_inputs": "positions",
    "with_completion": "rollout_rows",
}

__all__ = [
    "DistillationCollator",
    "Prepared",
    "causal_positions",
    "load_rows",
    "prepare_dataset",
    "preview_rows",
    "prompt_ids",
    "sample_id",
    "teacher_inputs",
    "with_completion",
]


__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})

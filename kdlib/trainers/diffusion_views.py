"""A step's masked rows: draws that follow from seed, step and sample, views stacked into one batch, what is scored on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdlib.diffusion.masking import Draws
from kdlib.diffusion.noise import Rows
from kdlib.diffusion.spec import DiffusionSpec
from kdlib.keys import draw_key
from kdlib.objectives.diffusion.base import Corruption, Scored
from kdlib.trainers.diffusion_layout import Layout
from kdlib.types import Positions

Batch = dict[str, Any]


def rows_of(batch: Batch, spec: DiffusionSpec) -> Rows:
    """The rows before they are masked."""
    rank: Tensor = batch["rank"]
    maskable = rank >= 0
    return Rows(
        ids=batch["input_ids"],
        maskable=maskable,
        rank=rank,
        length=rank.max(1).values + 1,
        commit_step=batch.get("commit_step"),
        visible=batch["attention_mask"].bool(),
        before=maskable.int().argmax(1) if spec.blocks_from == "sequence" else None,
    )


def draws_of(batch: Batch, *, seed: int, step: int, stream: int = 0) -> Draws:
    """The draws of each row in a step, keyed by its sample; those of another ``stream`` are independent of them."""
    seeds = [draw_key(seed, step, sample, stream) for sample in batch["sample_id"].tolist()]
    return Draws.of(seeds, length=batch["rank"].max(1).values + 1)


def stacked(views: list[Batch], *, prefix: str = "") -> Batch:
    """The views' rows, one view after the other."""
    return {f"{prefix}{name}": torch.cat([view[name] for view in views]) for name in views[0]}


def positions_of(batch: Batch, corruption: Corruption, *, student: Layout, teacher: Layout) -> dict[str, Positions]:
    """Each term's rows in the stacked views: where the student says a token, and where the teacher does."""
    here = student.read_at(batch)
    there = teacher.read_at(batch) if corruption.teacher else here
    return {name: _positions(batch, scored, here, there) for name, scored in corruption.scored.items()}


def _positions(batch: Batch, scored: Scored, here: tuple[Tensor, int], there: tuple[Tensor, int]) -> Positions:
    row, column = scored.where.nonzero(as_tuple=True)
    B = len(batch["input_ids"])

    def index(view: Tensor | int, layout: tuple[Tensor, int]) -> Tensor:
        read_at, width = layout
        return (view * B + row) * width + read_at[row, column]

    teacher = scored.teacher
    if isinstance(teacher, Tensor):
        teacher = teacher[row, column]
    return Positions(
        index=index(scored.view, here),
        labels=batch["input_ids"][row, column],
        sequence=row,
        weight=None if scored.weight is None else scored.weight[row, column].float(),
        teacher_index=None if teacher is None else index(teacher, there),
        total=scored.total,
    )


def on_device(positions: Mapping[str, Positions], device: torch.device) -> dict[str, Positions]:
    return {name: where.to(device) for name, where in positions.items()}

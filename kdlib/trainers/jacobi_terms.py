"""Where a teacher of its own reads the rows of consistency training."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kdlib.trainers.distillation import Batch


def teacher_reads_text(made: Batch, batch: Batch) -> Batch:
    """A teacher of its own needs no states: it reads the first columns, which are the text."""
    S, width = batch["input_ids"].shape[1], made["input_ids"].shape[1]
    positions = {
        name: replace(where, teacher_index=where.teacher_index // width * S + where.teacher_index % width)
        for name, where in made["positions"].items()
    }
    text = {"teacher_input_ids": batch["input_ids"], "teacher_attention_mask": batch["attention_mask"]}
    return {**made, **text, "positions": positions}

"""Which positions of a causal language model are scored: the one place where data and labels are shifted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kdlib.data.draft import UNSCORED
from kdlib.types import Positions

# What says which tokens a model reads, where they stand and what they see.
TEACHER_READS = ("input_ids", "attention_mask", "position_ids", "order", "stream", "clean_until")


def causal_positions(batch: Mapping[str, Tensor]) -> Positions:
    """Positions t whose next token is scored: labels[t + 1] != -100, row by row, left to right.

    ``batch`` holds ``labels`` and ``sequence`` [B, S], unshifted, with -100 at every sample's first token (so
    that no position predicts the next sample of a packed row). ``index`` [N] counts in the flattened [B * S];
    ``labels``, ``sequence`` and ``drawn`` [N] (with ``drawn_logp`` [B, S]) are those of the predicted token;
    ``teacher_index`` [N] (with ``teacher_input_ids`` [B, S']) counts in the flattened [B * S']. All are on the
    device of the batch.
    """
    labels, sequence, drawn = batch["labels"], batch["sequence"], batch.get("drawn_logp")
    line, position = (labels[:, 1:] != UNSCORED).nonzero(as_tuple=True)
    return Positions(
        index=line * labels.shape[1] + position,
        labels=labels[line, position + 1],
        sequence=sequence[line, position + 1],
        drawn=None if drawn is None else drawn[line, position + 1],
        teacher_index=_of_teacher(batch, line, position) if "teacher_input_ids" in batch else None,
    )


def _of_teacher(batch: Mapping[str, Tensor], line: Tensor, position: Tensor) -> Tensor:
    """Both inputs end with the same scored tokens, so that the same position is as far from either end."""
    shift = batch["teacher_attention_mask"].sum(-1) - batch["attention_mask"].sum(-1)
    return line * batch["teacher_input_ids"].shape[1] + position + shift[line]


def teacher_inputs(batch: Mapping[str, Any], positions: Positions) -> tuple[dict[str, Any], Tensor]:
    """The batch as the teacher reads it, and where ``positions`` are in it [N].

    Without ``teacher_index`` these are the batch and ``positions.index``; else what the batch has for the teacher
    (``teacher_input_ids`` [B, S'], ``teacher_attention_mask`` and others of TEACHER_READS) takes the place of all that places
    the student's tokens.
    """
    if positions.teacher_index is None:
        return dict(batch), positions.index
    if "teacher_input_ids" not in batch:
        return dict(batch), positions.teacher_index
    kept = {key: value for key, value in batch.items() if key not in TEACHER_READS}
    inputs = {key: batch[f"teacher_{key}"] for key in TEACHER_READS if f"teacher_{key}" in batch}
    return {**kept, **inputs}, positions.teacher_index

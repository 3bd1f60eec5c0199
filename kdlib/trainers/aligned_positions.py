"""The scored positions of rows that student and teacher read in tokens of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdlib.data.draft import UNSCORED
from kdlib.data.positions import causal_positions
from kdlib.types import Positions


def aligned_positions(batch: Mapping[str, Any]) -> Positions:
    """The student's Positions with the teacher's as ``other``, and the chunks of both, numbered through the batch.

    Rows that are not scored on the student's side, as those that fill an evaluation's last batch, are scored on neither.
    """
    other = batch["other"]
    scored = (batch["labels"] != UNSCORED).any(1)
    counts = torch.where(scored, batch["chunk"].amax(1) + 1, 0)
    first = counts.cumsum(0) - counts
    theirs = {**other, "labels": other["labels"].where(scored[:, None], UNSCORED)}
    chunks = int(counts.sum())
    return replace(_with_chunks(batch, first, chunks), other=_with_chunks(theirs, first, chunks))


def _with_chunks(batch: Mapping[str, Any], first: Tensor, chunks: int) -> Positions:
    """Positions with the token read at each, and the chunk of the token that each predicts."""
    found = causal_positions(batch)
    chunk = torch.where(batch["chunk"] >= 0, batch["chunk"] + first[:, None], -1)
    tokens = batch["input_ids"].flatten()[found.index]
    return replace(found, tokens=tokens, chunk=chunk.flatten()[found.index + 1], chunks=chunks)


def without_sequences(positions: Positions, bad: Tensor) -> Positions:
    """The positions without those of the sequences ``bad``, on both sides; chunks are numbered anew."""
    other, chunk = positions.other, positions.chunk
    assert other is not None and chunk is not None and other.chunk is not None
    ours, theirs = ~torch.isin(positions.sequence, bad), ~torch.isin(other.sequence, bad)
    left = chunk[ours & (chunk >= 0)].unique()
    renumbered = torch.full((positions.chunks + 1,), -1, device=chunk.device)  # the last stands for none
    renumbered[left] = torch.arange(len(left), device=chunk.device)
    return replace(
        replace(positions, chunk=None, other=None, total=None).kept(ours),
        chunk=renumbered[chunk[ours]],
        chunks=len(left),
        other=replace(replace(other, chunk=None).kept(theirs), chunk=renumbered[other.chunk[theirs]], chunks=len(left)),
    )

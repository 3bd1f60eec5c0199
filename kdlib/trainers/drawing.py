"""Tokens that a teacher draws itself while a step is prepared."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdlib.types import DenseView, Positions, Teacher

CHUNK = 256  # rows of logits held at a time


def drawn_tokens(
    teacher: Teacher,
    read: Mapping[str, Any],
    *,
    where: Tensor,
    read_at: tuple[Tensor, int],
    known: Tensor,
    uniform: Tensor,
    mask_token_id: int | None,
) -> Tensor:
    """``known`` [B, S] with tokens ~ p(. | read) where ``where`` [B, S], by the inverse of the distribution function.

    ``read``: what the teacher reads; ``read_at``: the column that says each token, and the number of columns; ``uniform``
    [B, S] one number for each token. The mask token is never drawn.
    """
    row, column = where.nonzero(as_tuple=True)
    columns, width = read_at
    index = (row * width + columns[row, column]).to(read["input_ids"].device)
    positions = Positions(index=index, labels=known[row, column].to(index.device), sequence=row.to(index.device))
    signal = teacher.signal(read, positions)
    chosen = [
        _drawn(signal.view(slice(start, start + CHUNK)), uniform[row, column][start : start + CHUNK], mask_token_id)
        for start in range(0, len(row), CHUNK)
    ]
    made = known.clone()
    made[row, column] = torch.cat(chosen).to(made.device)
    return made


def _drawn(view: Any, uniform: Tensor, mask_token_id: int | None) -> Tensor:
    logits = view.logits.clone()
    if mask_token_id is not None and mask_token_id < logits.shape[-1]:
        logits[:, mask_token_id] = -torch.inf
    share = DenseView(logits).at(1.0).logp.double().exp().cumsum(-1)
    below = uniform.to(share.device)[:, None] * share[:, -1:]
    return torch.searchsorted(share, below, right=True).clamp(max=logits.shape[-1] - 1)[:, 0]

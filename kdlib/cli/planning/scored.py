"""Some of a batch's scored rows in the place of all, and what the others would hold."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from kdlib.cli.planning.live import tensor_bytes
from kdlib.types import Positions, TeacherSignal


def first_rows(positions: Positions, signal: Any, *, limit: int) -> tuple[Positions, TeacherSignal | None]:
    """The first ``limit`` rows of both; all of them where rows of two tokenizers belong together."""
    if positions.chunk is not None or len(positions) <= limit:
        return positions, signal
    stored = {f.name: getattr(positions, f.name) for f in fields(positions)}
    cut: dict[str, Any] = {name: x[:limit] for name, x in stored.items() if isinstance(x, Tensor)}
    kept = None if signal is None else signal.kept(torch.arange(limit))
    return replace(positions, **cut), kept


def left_out(rows: int, *, width: int, signal: TeacherSignal | None, args: Any) -> int:
    """Bytes of ``rows`` rows: the student's hidden states, their float32 gradient, and the teacher's rows."""
    own = rows * width * ((2 if args.compute_dtype else 4) + 4)
    if signal is None or len(signal) == 0:
        return own
    stored = [x for x in (signal.hidden, signal.logp, signal.ids, signal.logits) if x is not None] if rows else []
    return own + rows * tensor_bytes(stored) // len(signal)


def buffers(rows: int, vocab_size: int, signal: TeacherSignal | None) -> int:
    """Bytes of ``rows`` more in the float32 logits of a chunk, the student's and those of a teacher with hidden states."""
    return rows * vocab_size * 4 * (1 if signal is None or signal.hidden is None else 2)

"""One batch that holds every row's text and, as streams beside it, the chosen states of its blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlib.data.draft import UNSCORED, last_span
from kdlib.data.jacobi.states import Noisy
from kdlib.streams import CLEAN, PADDING
from kdlib.types import Positions

CONSISTENCY, AR = "consistency", "ar"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """``context``: what a block's states see before the block, the text itself (``clean``, CLLM) or the states of the blocks
    before it in its window of ``window_size`` blocks (``noisy``, Jacobi Forcing).
    """

    block_size: int
    context: str = "clean"
    window_size: int = 16


@dataclass(kw_only=True)
class _Line:
    """One row: its tokens, what each is (columns of position, stream, clean_until), and the pairs of rows that are scored."""

    ids: list[NDArray[Any]]
    what: list[NDArray[Any]]
    width: int
    consistency: list[NDArray[Any]] = field(default_factory=list)
    ar: list[NDArray[Any]] = field(default_factory=list)

    def add(self, tokens: NDArray[Any], *, start: int, stream: int, clean_until: int) -> int:
        """Appends a stream's tokens at ``start``; the column of the first."""
        column, n = self.width, len(tokens)
        self.ids.append(tokens)
        self.what.append(np.stack([start + np.arange(n), np.full(n, stream), np.full(n, clean_until)]))
        self.width += n
        return column


def packed(
    batch: Mapping[str, Any],
    noisy: Sequence[Sequence[Noisy]],
    *,
    layout: Layout,
    references: Sequence[Sequence[int]],
    pad_token_id: int,
) -> dict[str, Any]:
    """The batch of [text | states | reference] rows, on the CPU, with ``positions`` of its two terms.

    ``batch``: right-padded ``input_ids``, ``labels``, ``attention_mask`` [B, S]; ``noisy``: each row's chosen states;
    ``references``: what the auto-regressive term learns in place of a row's last completion, () for its own.
    Adds ``stream`` and ``clean_until``. Terms: ``consistency`` pairs place i of a state (i from its first mismatch on) with the
    text's own place or, where ``following`` is given, with the following state's (``teacher_index``); its label is the text's
    next token. ``ar`` scores the text's labels. Text columns come first, so that the first S columns are the text alone.
    """
    ids, labels = batch["input_ids"].cpu().numpy(), batch["labels"].cpu().numpy()
    lengths = batch["attention_mask"].sum(-1).cpu().numpy()
    lines = [
        _line(ids[row], labels[row], int(lengths[row]), noisy[row], layout=layout, reference=references[row])
        for row in range(len(ids))
    ]
    width = max(line.width for line in lines)
    fill = {"input_ids": pad_token_id, "position_ids": 0, "stream": PADDING, "clean_until": 0}
    made = {key: np.full((len(lines), width), value, dtype=np.int64) for key, value in fill.items()}
    for row, line in enumerate(lines):
        for key, values in zip(made, [np.concatenate(line.ids), *np.concatenate(line.what, 1)], strict=True):
            made[key][row, : line.width] = values
    tensors = {key: torch.from_numpy(values) for key, values in made.items()}
    pairs = {name: _positions([getattr(line, name) for line in lines], width=width) for name in (CONSISTENCY, AR)}
    return {**tensors, "attention_mask": (tensors["stream"] != PADDING).long(), "positions": pairs}


def _line(
    ids: NDArray[Any], labels: NDArray[Any], length: int, noisy: Sequence[Noisy], *, layout: Layout, reference: Sequence[int]
) -> _Line:
    S = len(ids)
    line = _Line(ids=[ids], what=[np.stack([np.arange(S), np.full(S, CLEAN), np.zeros(S, dtype=np.int64)])], width=S)
    line.what[0][1, length:] = PADDING
    start, end = last_span(labels[:length].tolist())
    _add_noisy(line, ids[:end], noisy, start=start, layout=layout)  # what follows is no completion, and is not taught
    _add_ar(line, labels, span=(start, end), reference=reference if start < end else ())
    return line


def _add_noisy(line: _Line, ids: NDArray[Any], noisy: Sequence[Noisy], *, start: int, layout: Layout) -> None:
    """Streams of the chosen states; with noisy context one for each window, else one for each state."""
    reach = layout.window_size * layout.block_size
    for index, state in enumerate(noisy):
        n, window = len(state.tokens), state.number // layout.window_size
        if layout.context == "noisy":
            where = {"stream": 1 + window, "clean_until": start + window * reach}
        else:
            where = {"stream": 1 + 2 * index, "clean_until": state.start}
        column = line.add(state.tokens, start=state.start, **where)
        following = None
        if state.following is not None:
            following = line.add(state.following, start=state.start, stream=2 + 2 * index, clean_until=state.start)
        wrong = state.tokens != ids[state.start : state.start + n]
        places = np.arange(int(wrong.argmax()) if wrong.any() else n, min(n, len(ids) - 1 - state.start))
        of_teacher = state.start + places if following is None else following + places
        line.consistency.append(np.stack([column + places, of_teacher, ids[state.start + places + 1]]))


def _add_ar(line: _Line, labels: NDArray[Any], *, span: tuple[int, int], reference: Sequence[int]) -> None:
    """The text's labels, or ``reference`` as a stream after the same prompt in place of the last completion."""
    start, end = span
    scored = np.flatnonzero(labels[1:] != UNSCORED)
    if len(reference):
        scored = scored[(scored + 1 < start) | (scored + 1 >= end)]
        tokens = np.asarray(reference)
        column = line.add(tokens, start=start, stream=-2, clean_until=start)
        before = np.concatenate([[start - 1], column + np.arange(len(tokens) - 1)])
        line.ar.append(np.stack([before, before, tokens]))
    line.ar.append(np.stack([scored, scored, labels[scored + 1]]))


def _positions(lines: Sequence[Sequence[NDArray[Any]]], *, width: int) -> Positions:
    """Rows of (column, teacher's column, label) as Positions in the flattened [B * width]."""
    empty = np.zeros((3, 0), dtype=np.int64)
    found = [np.concatenate([empty, *line], 1) for line in lines]
    row = np.repeat(np.arange(len(found)), [x.shape[1] for x in found])
    column, of_teacher, label = np.concatenate(found, 1)
    return Positions(
        index=torch.from_numpy(row * width + column),
        teacher_index=torch.from_numpy(row * width + of_teacher),
        labels=torch.from_numpy(label),
        sequence=torch.from_numpy(row),
    )

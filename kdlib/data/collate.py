"""Token rows -> one batch of tensors, right-padded, packed or flattened."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from kdlib.data.draft import UNSCORED, first_scored


@dataclass(frozen=True)
class DistillationCollator:
    """Pads prepared rows to a rectangle [B, S]; S is a multiple of ``pad_to_multiple_of`` when that is given.

    The batch holds ``input_ids``, ``labels`` (-100 at padding and at every sample's first token, which only
    another sample's token precedes) and ``sequence`` (which entry of ``sample_id`` a token belongs to;
    padding: the last of its row) [B, S], and ``sample_id`` [samples]. Plain rows add ``attention_mask``.
    Packed rows (``seq_lengths``) add ``position_ids``, which restart at every sample and at the padding:
    transformers derives the block-diagonal mask from them when it gets neither an attention mask nor a key-
    value cache, so call the model with ``use_cache=False``. ``flatten`` puts all samples into one row [1,
    total], packed and without padding, as flash attention wants them.

    Optional columns: ``teacher`` becomes a list of one name per entry of ``sample_id``; ``drawn_logp`` (of any row)
    a float32 [B, S], NaN where it is absent; ``teacher_prompt_ids`` (of any row) ``teacher_input_ids`` and
    ``teacher_attention_mask`` [B, S'], these ids in place of the tokens before the row's first scored one.
    """

    pad_token_id: int
    _: KW_ONLY
    pad_to_multiple_of: int | None = None
    flatten: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        packed = self.flatten or "seq_lengths" in rows[0]
        lines = [_Line.of(row) for row in rows]
        if self.flatten:
            lines = [_Line.joined(lines)]
        width = self._width(max(len(line.input_ids) for line in lines))
        first_samples = _offsets([len(line.lengths) for line in lines])
        batch: dict[str, Any] = {
            "input_ids": _padded([line.input_ids for line in lines], width, self.pad_token_id),
            "labels": _padded([line.scored_labels() for line in lines], width, UNSCORED),
            "sequence": torch.tensor([line.sequence(first, width) for line, first in zip(lines, first_samples, strict=True)]),
            "sample_id": torch.tensor([sample for line in lines for sample in line.sample_ids]),
        }
        if "teacher" in rows[0]:
            names = [row["teacher"] if "seq_lengths" in row else [row["teacher"]] for row in rows]
            batch["teacher"] = [name for of_row in names for name in of_row]
        if any(row.get("drawn_logp") is not None for row in rows):
            batch["drawn_logp"] = _padded([line.drawn for line in lines], width, math.nan)
        if packed:
            assert not self._of_teacher(rows), "a teacher_prompt cannot stand before a sample of a packed row"
            return {**batch, "position_ids": torch.tensor([line.positions(width) for line in lines])}
        return {**batch, "attention_mask": _mask([line.input_ids for line in lines], width), **self._of_teacher(rows)}

    def _of_teacher(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """What the teacher reads, when any row has a prompt of its own for it."""
        if all(row.get("teacher_prompt_ids") is None for row in rows):
            return {}
        lines = [_seen_by_teacher(row) for row in rows]
        width = self._width(max(map(len, lines)))
        return {
            "teacher_input_ids": _padded(lines, width, self.pad_token_id),
            "teacher_attention_mask": _mask(lines, width),
        }

    def _width(self, longest: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-longest // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One line of the batch: the samples in it end to end, ``lengths`` tokens each."""

    input_ids: list[int]
    labels: list[int]
    lengths: list[int]
    sample_ids: list[int]
    drawn: list[float]

    @staticmethod
    def of(row: Mapping[str, Any]) -> _Line:
        packed = "seq_lengths" in row
        return _Line(
            input_ids=row["input_ids"],
            labels=row["labels"],
            lengths=row["seq_lengths"] if packed else [len(row["input_ids"])],
            sample_ids=row["sample_id"] if packed else [row["sample_id"]],
            drawn=row.get("drawn_logp") or [math.nan] * len(row["input_ids"]),
        )

    @staticmethod
    def joined(lines: Sequence[_Line]) -> _Line:
        return _Line(
            input_ids=[token for line in lines for token in line.input_ids],
            labels=[label for line in lines for label in line.labels],
            lengths=[length for line in lines for length in line.lengths],
            sample_ids=[sample for line in lines for sample in line.sample_ids],
            drawn=[logp for line in lines for logp in line.drawn],
        )

    def scored_labels(self) -> list[int]:
        labels = list(self.labels)
        for start in _offsets(self.lengths):
            labels[start] = UNSCORED
        return labels

    def positions(self, width: int) -> list[int]:
        pad = width - len(self.input_ids)
        return [position for length in (*self.lengths, pad) for position in range(length)]

    def sequence(self, first: int, width: int) -> list[int]:
        indices = [first + index for index, length in enumerate(self.lengths) for _ in range(length)]
        return indices + [indices[-1]] * (width - len(indices))


def _offsets(lengths: Sequence[int]) -> list[int]:
    """Where each of these lengths begins when they stand end to end."""
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _seen_by_teacher(row: Mapping[str, Any]) -> list[int]:
    """The teacher's prompt, or the row's own, and everything from the first scored token on."""
    start = first_scored(row["labels"])
    own = row.get("teacher_prompt_ids")
    return [*(row["input_ids"][:start] if own is None else own), *row["input_ids"][start:]]


def _mask(lines: Sequence[Sequence[int]], width: int) -> Tensor:
    return _padded([[1] * len(line) for line in lines], width, 0)


def _padded(lines: Sequence[Sequence[float]], width: int, fill: float) -> Tensor:
    """[B, width]: float32 for a ``fill`` that is a float, else int64."""
    dtype = torch.float32 if isinstance(fill, float) else torch.long
    return torch.tensor([[*line, *[fill] * (width - len(line))] for line in lines], dtype=dtype)

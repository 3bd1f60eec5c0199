"""Token rows -> one batch of tensors, right-padded, packed or flattened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor

from kdlib.data.draft import UNSCORED


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
    """

    pad_token_id: int
    _: KW_ONLY
    pad_to_multiple_of: int | None = None
    flatten: bool = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        packed = self.flatten or "seq_lengths" in rows[0]
        lines = [_Line.of(row) for row in rows]
        if self.flatten:
            lines = [_Line.joined(lines)]
        width = self._width(max(len(line.input_ids) for line in lines))
        first_samples = _offsets([len(line.lengths) for line in lines])
        batch = {
            "input_ids": _padded([line.input_ids for line in lines], width, self.pad_token_id),
            "labels": _padded([line.scored_labels() for line in lines], width, UNSCORED),
            "sequence": torch.tensor([line.sequence(first, width) for line, first in zip(lines, first_samples, strict=True)]),
            "sample_id": torch.tensor([sample for line in lines for sample in line.sample_ids]),
        }
        if packed:
            return {**batch, "position_ids": torch.tensor([line.positions(width) for line in lines])}
        return {**batch, "attention_mask": _padded([[1] * len(line.input_ids) for line in lines], width, 0)}

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

    @staticmethod
    def of(row: Mapping[str, Any]) -> _Line:
        packed = "seq_lengths" in row
        return _Line(
            input_ids=row["input_ids"],
            labels=row["labels"],
            lengths=row["seq_lengths"] if packed else [len(row["input_ids"])],
            sample_ids=row["sample_id"] if packed else [row["sample_id"]],
        )

    @staticmethod
    def joined(lines: Sequence[_Line]) -> _Line:
        return _Line(
            input_ids=[token for line in lines for token in line.input_ids],
            labels=[label for line in lines for label in line.labels],
            lengths=[length for line in lines for length in line.lengths],
            sample_ids=[sample for line in lines for sample in line.sample_ids],
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


def _padded(lines: Sequence[Sequence[int]], width: int, fill: int) -> Tensor:
    return torch.tensor([[*line, *[fill] * (width - len(line))] for line in lines], dtype=torch.long)

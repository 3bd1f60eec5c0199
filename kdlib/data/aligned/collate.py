"""Batches of rows that student and teacher read in tokens of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdlib.data.aligned.chunks import Aligned, Ids, TextRow, aligned
from kdlib.data.aligned.reader import Reader
from kdlib.data.collate import DistillationCollator
from kdlib.data.draft import UNSCORED, first_scored

TEACHER = {"teacher_ids": "input_ids", "teacher_labels": "labels", "teacher_sample_id": "sample_id"}

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class AlignedCollator:
    """A DistillationCollator's batch of the student's tokens with the teacher's as ``other``, an ordinary batch of its own.

    Both have ``chunk`` [B, S] and [B, S'], numbered from 0 in each row, -1 for tokens of none. A row whose completion was
    generated is tokenised for the teacher from the bytes that it spells, behind the teacher's own tokens up to
    ``teacher_start`` (-1: the teacher's row ends before, and nothing of it is scored). ``closing`` is the token that ends the
    teacher's turns. ``unread`` [B]: whether the teacher reads another text in a turn, or nothing.
    """

    student: Reader
    teacher: Reader
    closing: int | None

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        others = [self._other(row) for row in rows]
        pairs = [self._aligned(row, other) for row, other in zip(rows, others, strict=True)]
        batch, other = self._collated(self.student, rows), self._collated(self.teacher, others)
        batch["chunk"] = _padded([pair.student for pair in pairs], batch["input_ids"].shape[1])
        other["chunk"] = _padded([pair.teacher for pair in pairs], other["input_ids"].shape[1])
        asked = [any(label != UNSCORED for label in row["labels"]) for row in rows]
        unread = [pair.different > 0 or (scored and pair.count == 0) for pair, scored in zip(pairs, asked, strict=True)]
        return {**batch, "other": other, "unread": torch.tensor(unread)}

    def _collated(self, reader: Reader, rows: Sequence[Row]) -> dict[str, Any]:
        return DistillationCollator(reader.padding)(rows)

    def _aligned(self, row: Row, other: Row) -> Aligned:
        return aligned(
            TextRow(input_ids=row["input_ids"], labels=row["labels"], reader=self.student),
            TextRow(input_ids=other["input_ids"], labels=other["labels"], reader=self.teacher),
        )

    def _other(self, row: Row) -> dict[str, Any]:
        """The teacher's row, all unscored where the student's is."""
        other = {ours: row[theirs] for theirs, ours in TEACHER.items()}
        if all(label == UNSCORED for label in row["labels"]):
            return {**other, "labels": [UNSCORED] * len(other["labels"])}
        return self._answered(row, other) if row.get("generated") else other

    def _answered(self, row: Row, other: Row) -> dict[str, Any]:
        start = row["teacher_start"]
        if start < 0:
            return {**other, "labels": [UNSCORED] * len(other["labels"])}
        prompt = other["input_ids"][:start]
        answer = self._retokenised(row["input_ids"][first_scored(row["labels"]) :])
        return {**other, "input_ids": [*prompt, *answer], "labels": [UNSCORED] * len(prompt) + answer}

    def _retokenised(self, ids: Sequence[int]) -> list[int]:
        """The teacher's tokens of what the student's spell; none, cut, behind a byte that is no UTF-8."""
        closed = ids[-1] in self.student.special
        spelled = self.student.text(ids[:-1] if closed else ids)
        text = _valid(spelled)
        try:
            made = self.teacher.continued(text)
        except ValueError:
            return []  # nothing of it is scored; ``unread`` counts it
        whole = closed and len(text.encode()) == len(spelled)
        return [*made, self.closing] if whole and self.closing is not None else made


def _valid(spelled: bytes) -> str:
    try:
        return spelled.decode()
    except UnicodeDecodeError as error:
        return spelled[: error.start].decode()


def _padded(lines: Sequence[Ids], width: int) -> Tensor:
    padded = np.full((len(lines), width), -1, np.int64)
    for row, line in zip(padded, lines, strict=True):
        row[: len(line)] = line
    return torch.from_numpy(padded)

"""Rows of a dataset -> token rows of the student and of the teacher, each by its own tokenizer and chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from datasets import Dataset, Features, Value, concatenate_datasets
from numpy.typing import NDArray

from kdlib.data.aligned.chunks import TextRow, aligned
from kdlib.data.aligned.collate import TEACHER
from kdlib.data.aligned.reader import Reader
from kdlib.data.aligned.turns import paired_turns
from kdlib.data.draft import UNSCORED, BadRowError
from kdlib.data.rows import Prepared, prepare_dataset

_VERSION = 1  # raise it when the same rows would be joined in another way: joined rows on disk are found by it
_JOINED = Features({"reason": Value("string"), "teacher_start": Value("int64")})
_UNREAD = BadRowError(
    "student and teacher read different texts",
    fix="look for characters that one tokenizer does not know or rewrites, and for a chat template that rewrites answers",
)
_APART = BadRowError("no token ends where one of the other side does", fix="raise max_length, which cuts one side early")


def prepare_aligned(
    rows: Dataset, student: Reader, teacher: Reader, *, skip_bad_rows: bool = False, **options: Any
) -> Prepared:
    """``prepare_dataset`` for both: ``teacher_ids``, ``teacher_labels``, ``teacher_sample_id`` beside the student's columns.

    ``teacher_start`` is the teacher's token at which the student's last turn starts there, -1 when its row ends before.
    Conversations that become one row on one side and a row for each turn on the other become a row for each turn on both.
    A row without a chunk scored on both sides (a tokenizer that is not lossless, a template that rewrites turns, a cut on one
    side) is as bad as one that either side cannot use; each is counted once, by its first reason. ``truncated`` counts the cuts
    of both sides. Raises ValueError for rows of token ids, for a tokenizer that leaves out bytes, and for bad rows, which
    ``skip_bad_rows`` drops and counts.
    """
    _check(rows, student, teacher)
    own = prepare_dataset(rows, student.tokenizer, skip_bad_rows=skip_bad_rows, keep_source=True, **options)
    left = np.unique(_column(own.dataset, "source"))
    rest = rows if len(left) == len(rows) else rows.select(left)
    other = prepare_dataset(rest, teacher.tokenizer, skip_bad_rows=skip_bad_rows, keep_source=True, **options)
    pairs = _pairs(own.dataset, other.dataset, left)
    joined = _joined(pairs, (student, teacher), skip_bad_rows=skip_bad_rows, num_proc=options.get("num_proc"))
    outcomes = joined["reason"][:]
    reasons = Counter(reason for reason in outcomes if reason)
    if reasons.total() == len(pairs):
        raise ValueError(f"no row can be aligned ({', '.join(f'{n} x {reason}' for reason, n in reasons.items())})")
    dataset = concatenate_datasets([pairs.remove_columns("source"), joined.remove_columns("reason")], axis=1)
    if reasons:
        dataset = dataset.select([i for i, reason in enumerate(outcomes) if not reason])
    counted = Counter(own.reasons) + Counter(other.reasons) + reasons
    return Prepared(dataset=dataset, skipped=counted.total(), reasons=dict(counted), truncated=own.truncated + other.truncated)


def _check(rows: Dataset, student: Reader, teacher: Reader) -> None:
    """ValueError for columns that mean one tokenizer, and for tokenizers whose tokens leave out bytes."""
    if "input_ids" in rows.column_names:
        raise ValueError(
            "rows of token ids have no text for the teacher's tokenizer: give `messages`, `prompt` and `completion`"
        )
    if {"teacher_prompt", "teacher"} & set(rows.column_names):
        raise ValueError("columns teacher and teacher_prompt need teachers of the student's tokenizer: leave them out")
    student.check("student")
    teacher.check("teacher")


def _column(rows: Dataset, name: str) -> NDArray[np.int64]:
    return np.asarray(rows.with_format("numpy")[name][:], np.int64)


def _pairs(own: Dataset, other: Dataset, left: NDArray[np.int64]) -> Dataset:
    """The student's rows with the teacher's columns beside them; ``left``: what the other's sources are."""
    ours, theirs = _column(own, "source"), left[_column(other, "source")]
    pairs = _one_by_one(ours, theirs)
    if pairs is None:
        own, other = paired_turns(own, other, sources=(ours, theirs))
    else:
        own, other = _taken(own, pairs[0]), _taken(other, pairs[1])
    named = other.remove_columns("source").rename_columns({column: name for name, column in TEACHER.items()})
    return concatenate_datasets([own, named], axis=1)


def _one_by_one(ours: NDArray[np.int64], theirs: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
    """The places of rows of both sides that belong together; None where a source has more rows on one side."""
    both = np.intersect1d(ours, theirs)
    places = np.flatnonzero(np.isin(ours, both)), np.flatnonzero(np.isin(theirs, both))
    return places if np.array_equal(ours[places[0]], theirs[places[1]]) else None


def _taken(rows: Dataset, places: NDArray[np.int64]) -> Dataset:
    return rows if len(places) == len(rows) else rows.select(places)


def _joined(pairs: Dataset, readers: tuple[Reader, Reader], *, skip_bad_rows: bool, num_proc: int | None) -> Dataset:
    """Columns ``reason`` and ``teacher_start`` of the pairs."""
    named = xxhash.xxh64_hexdigest(repr((_VERSION, pairs._fingerprint, skip_bad_rows)).encode())
    return (
        pairs.with_format("arrow")
        .map(
            _Join(readers=readers, skip_bad_rows=skip_bad_rows),
            batched=True,
            remove_columns=pairs.column_names,
            features=_JOINED,
            num_proc=num_proc,
            desc="Aligning",
            new_fingerprint=named,
        )
        .with_format(None)
    )


@dataclass(frozen=True, kw_only=True)
class _Join:
    """Says of pairs of rows why they cannot be used, "" for those that can, and where the teacher's answer starts."""

    readers: tuple[Reader, Reader]
    skip_bad_rows: bool

    def __call__(self, table: pa.Table) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"reason": [], "teacher_start": []}
        columns = [_lists(table, name) for name in ("input_ids", "labels", "teacher_ids", "teacher_labels")]
        for source, *row in zip(table["source"].to_pylist(), *columns, strict=True):
            problem, start = self._joined(*row)
            if problem is not None and not self.skip_bad_rows:
                raise ValueError(f"row {source}: {problem}, or drop such rows with --skip_bad_rows true")
            found["reason"].append("" if problem is None else problem.reason)
            found["teacher_start"].append(start)
        return found

    def _joined(self, ids: Any, labels: Any, teacher_ids: Any, teacher_labels: Any) -> tuple[BadRowError | None, int]:
        if (labels == UNSCORED).all():
            return None, len(teacher_ids)  # a prompt, for the student to answer
        found = aligned(
            TextRow(input_ids=ids, labels=labels, reader=self.readers[0]),
            TextRow(input_ids=teacher_ids, labels=teacher_labels, reader=self.readers[1]),
        )
        start = -1 if found.answer is None else found.answer
        if found.count:
            return None, start
        return (_UNREAD if found.different else _APART), start


def _lists(table: pa.Table, name: str) -> Iterator[NDArray[np.int64]]:
    """The lists of a column as arrays."""
    column = table[name].combine_chunks()
    values, offsets = column.values.to_numpy(), column.offsets.to_numpy()
    return (values[start:end] for start, end in pairwise(offsets))

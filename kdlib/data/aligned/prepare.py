"""Rows of a dataset -> token rows of the student and of the teacher, each by its own tokenizer and chat template."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, concatenate_datasets

from kdlib.data.aligned.chunks import TextRow, aligned
from kdlib.data.aligned.collate import TEACHER
from kdlib.data.aligned.reader import Reader
from kdlib.data.draft import UNSCORED, BadRowError
from kdlib.data.rows import Prepared, prepare_dataset

_SPLIT = BadRowError("the two chat templates split the conversation differently", fix="give each answer its own row")
_UNREAD = BadRowError(
    "student and teacher read different texts",
    fix="look for characters that one tokenizer does not know or rewrites, and for a chat template that rewrites answers",
)
_APART = BadRowError("no token ends where one of the other side does", fix="raise max_length, which cuts one side early")


def prepare_aligned(
    rows: Dataset, student: Reader, teacher: Reader, *, skip_bad_rows: bool = False, **options: Any
) -> Prepared:
    """``prepare_dataset`` for both: ``teacher_ids``, ``teacher_labels``, ``teacher_sample_id`` beside the student's columns.

    A row without a chunk scored on both sides (a tokenizer that is not lossless, a template that rewrites turns, a cut on one
    side) is as bad as one that either side cannot use. ``truncated`` counts rows cut on either side. Raises ValueError for
    rows of token ids, for a tokenizer that leaves out bytes, and for bad rows, which ``skip_bad_rows`` drops and counts.
    """
    if "input_ids" in rows.column_names:
        raise ValueError(
            "rows of token ids have no text for the teacher's tokenizer: give `messages`, `prompt` and `completion`"
        )
    if {"teacher_prompt", "teacher"} & set(rows.column_names):
        raise ValueError("columns teacher and teacher_prompt need teachers of the student's tokenizer: leave them out")
    for reader, who in ((student, "student"), (teacher, "teacher")):
        reader.check(who)
    own, other = (
        prepare_dataset(rows, reader.tokenizer, skip_bad_rows=skip_bad_rows, keep_source=True, **options)
        for reader in (student, teacher)
    )
    pairs = _pairs(own.dataset, other.dataset)
    joined = pairs.map(
        _Joined(readers=(student, teacher), skip_bad_rows=skip_bad_rows), desc="Aligning", remove_columns=["source"]
    )
    reasons = Counter(reason for reason in joined["reason"][:] if reason)
    if reasons.total() == len(joined):
        raise ValueError(f"no row can be aligned ({', '.join(f'{n} x {reason}' for reason, n in reasons.items())})")
    kept = joined.filter(lambda reason: not reason, input_columns="reason") if reasons else joined
    skipped = len(rows) - len(set(own.dataset["source"]) & set(other.dataset["source"]))
    return Prepared(
        dataset=kept.remove_columns(["reason", "split"]),
        skipped=skipped + reasons.total(),
        reasons=dict(Counter(own.reasons | other.reasons) + reasons),
        truncated=own.truncated + other.truncated,
    )


def _pairs(own: Dataset, other: Dataset) -> Dataset:
    """The student's rows with the teacher's columns beside them; of conversations that became several rows, one by one."""
    theirs: dict[int, list[int]] = {}
    for place, source in enumerate(other["source"][:]):
        theirs.setdefault(source, []).append(place)
    ours = Counter(own["source"][:])
    places = [(place, source) for place, source in enumerate(own["source"][:]) if source in theirs]
    taken: Counter[int] = Counter()
    chosen = []
    for _, source in places:
        same = ours[source] == len(theirs[source])
        chosen.append(theirs[source][taken[source] if same else 0])
        taken[source] += 1
    split = [ours[source] != len(theirs[source]) for _, source in places]
    beside = other.select(chosen).remove_columns("source").rename_columns({column: name for name, column in TEACHER.items()})
    left = own.select([place for place, _ in places])
    return concatenate_datasets([left, beside, Dataset.from_dict({"split": split})], axis=1)


@dataclass(frozen=True, kw_only=True)
class _Joined:
    """Says of a pair of rows why it cannot be used: ``reason``, empty when it can."""

    readers: tuple[Reader, Reader]
    skip_bad_rows: bool

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        problem = self._problem(row)
        if problem is not None and not self.skip_bad_rows:
            raise ValueError(f"row {row['source']}: {problem}, or drop such rows with --skip_bad_rows true")
        return {"reason": "" if problem is None else problem.reason}

    def _problem(self, row: Mapping[str, Any]) -> BadRowError | None:
        if row["split"]:
            return _SPLIT
        if all(label == UNSCORED for label in row["labels"]):
            return None  # a prompt, for the student to answer
        found = aligned(
            TextRow(input_ids=row["input_ids"], labels=row["labels"], reader=self.readers[0]),
            TextRow(input_ids=row["teacher_ids"], labels=row["teacher_labels"], reader=self.readers[1]),
        )
        if found.count:
            return None
        return _UNREAD if found.different else _APART

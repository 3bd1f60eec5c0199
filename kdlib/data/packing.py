"""Several samples in one row, kept apart by ``seq_lengths``: the collator restarts position ids at each of
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from datasets import Dataset, Features, List, Value

from kdlib.data.draft import sample_id

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "seq_lengths": List(Value("int32")),
        "sample_id": List(Value("int64")),
    }
)

_CODE = "teacher_code"


def pack_rows(dataset: Dataset, *, max_length: int) -> Dataset:
    """Best-fit-decreasing bins of at most ``max_length`` tokens, no sample cut; the same rows give the same
    bins.

    Takes prepared rows of at most ``max_length`` tokens; ``sample_id``, ``seq_lengths`` and, where the rows
    have it, ``teacher`` then hold one value per sample.
    """
    from trl import pack_dataset  # slow to import

    names: list[str | None] = []
    features, packable = dict(_FEATURES), dataset.select_columns(["input_ids", "labels"])
    if "teacher" in dataset.column_names:
        names = sorted(set(dataset["teacher"][:]), key=str)
        features["teacher"] = List(Value("string"))
        packable = dataset.select_columns(["input_ids", "labels", "teacher"]).map(
            partial(_with_codes, names=names), batched=True, remove_columns=["teacher"], desc="Numbering teachers"
        )
    packed = pack_dataset(packable, max_length, strategy="bfd", map_kwargs={"desc": "Packing"})
    return packed.map(
        partial(_with_samples, names=names),
        batched=True,
        remove_columns=[_CODE] if names else [],
        features=Features(features),
        desc="Naming samples",
    )


def _with_codes(batch: dict[str, list[Any]], *, names: Sequence[str | None]) -> dict[str, list[list[int]]]:
    """Each row's teacher as a number on all its tokens: only columns of one value per token can be packed."""
    rows = zip(batch["teacher"], batch["input_ids"], strict=True)
    return {_CODE: [[names.index(teacher)] * len(ids) for teacher, ids in rows]}


def _with_samples(batch: dict[str, list[Any]], *, names: Sequence[str | None]) -> dict[str, list[list[Any]]]:
    rows = zip(batch["input_ids"], batch["labels"], batch["seq_lengths"], strict=True)
    made: dict[str, list[list[Any]]] = {"sample_id": [_segment_ids(*row) for row in rows]}
    if names:
        coded = zip(batch[_CODE], batch["seq_lengths"], strict=True)
        made["teacher"] = [[names[codes[end - 1]] for end in accumulate(lengths)] for codes, lengths in coded]
    return made


def _segment_ids(ids: list[int], labels: list[int], lengths: list[int]) -> list[int]:
    ends = list(accumulate(lengths))
    return [sample_id(ids[end - length : end], labels[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

"""Several samples in one row, kept apart by ``seq_lengths``: the collator restarts position ids at each of
them.
"""

from __future__ import annotations

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


def pack_rows(dataset: Dataset, *, max_length: int) -> Dataset:
    """Best-fit-decreasing bins of at most ``max_length`` tokens, no sample cut; the same rows give the same
    bins.

    Takes prepared rows of at most ``max_length`` tokens; ``sample_id`` and ``seq_lengths`` then hold one
    value per sample.
    """
    from trl import pack_dataset  # slow to import

    packed = pack_dataset(
        dataset.select_columns(["input_ids", "labels"]),
        max_length,
        strategy="bfd",
        map_kwargs={"desc": "Packing"},
    )
    return packed.map(_with_sample_ids, batched=True, features=_FEATURES, desc="Naming samples")


def _with_sample_ids(batch: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
    rows = zip(batch["input_ids"], batch["labels"], batch["seq_lengths"], strict=True)
    return {"sample_id": [_segment_ids(ids, labels, lengths) for ids, labels, lengths in rows]}


def _segment_ids(ids: list[int], labels: list[int], lengths: list[int]) -> list[int]:
    ends = list(accumulate(lengths))
    return [sample_id(ids[end - length : end], labels[end - length : end]) for end, length in zip(ends, lengths, strict=True)]

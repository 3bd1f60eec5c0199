"""Conversations that one chat template renders as one row and another as a row for each turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from kdlib.data.draft import UNSCORED, sample_id

Place = tuple[int, int]  # a row, and which of its turns; -1 for all of them
Sources = NDArray[np.int64]


def paired_turns(own: Dataset, other: Dataset, *, sources: tuple[Sources, Sources]) -> tuple[Dataset, Dataset]:
    """The rows of both sides that belong together, in order.

    Where a source has more rows on one side, its rows are cut behind each turn, of which that turn alone is scored, and those
    of both sides are paired as far as they go: what is missing at the end was cut off.
    """
    counts = [Counter(side.tolist()) for side in sources]
    shared = counts[0].keys() & counts[1].keys()
    apart = {source for source in shared if counts[0][source] != counts[1][source]}
    places = [_places(rows, side, shared, apart) for rows, side in zip((own, other), sources, strict=True)]
    pairs = [pair for source in sorted(shared) for pair in zip(places[0][source], places[1][source], strict=False)]
    return _taken(own, [mine for mine, _ in pairs]), _taken(other, [its for _, its in pairs])


def _places(rows: Dataset, sources: Sources, shared: set[int], apart: set[int]) -> dict[int, list[Place]]:
    """What each source has become."""
    found: dict[int, list[Place]] = {}
    for row, source in enumerate(sources.tolist()):
        if source in shared:
            turns = range(len(spans(rows[row]["labels"]))) if source in apart else [-1]
            found.setdefault(source, []).extend((row, turn) for turn in turns)
    return found


def _taken(rows: Dataset, places: list[Place]) -> Dataset:
    chosen = rows.select([row for row, _ in places]).add_column("turn", [turn for _, turn in places])
    return chosen.map(_cut, remove_columns="turn", features=rows.features)


def _cut(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["turn"] < 0:
        return {}
    start, end = spans(row["labels"])[row["turn"]]
    ids, labels = row["input_ids"][:end], [UNSCORED] * start + row["labels"][start:end]
    return {"input_ids": ids, "labels": labels, "sample_id": sample_id(ids, labels)}


def spans(labels: list[int]) -> list[Place]:
    """Where each run of scored tokens starts and ends."""
    scored = np.asarray(labels) != UNSCORED
    return [(start, end) for start, end in np.flatnonzero(np.diff(scored, prepend=False, append=False)).reshape(-1, 2).tolist()]

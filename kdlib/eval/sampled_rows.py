"""Which rows a score is of."""

from __future__ import annotations

import json

import xxhash
from datasets import Dataset


def rows_fingerprint(rows: Dataset) -> str:
    """xxhash128 of everything in the rows, in their order."""
    digest = xxhash.xxh3_128()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def limited(rows: Dataset, limit: float | None) -> Dataset:
    """The first rows; ``limit`` as lm-eval has it: so many, or below 1 this share of them."""
    if limit is None:
        return rows
    return rows.select(range(min(len(rows), int(limit) if limit >= 1 else max(1, int(limit * len(rows))))))

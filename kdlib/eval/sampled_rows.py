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

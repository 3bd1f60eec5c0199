"""Pairs -> one batch in which both answers of a pair stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kdlib.data.collate import DistillationCollator

ANSWER = ("input_ids", "labels", "sample_id")  # of the right answer; under ``rejected_`` those of the wrong one


class PairCollator:
    """Pads the answers of pairs to a rectangle [lines, S], as DistillationCollator does; a pair is one line or two.

    ``sequence`` [lines, S] is 2i on the right answer of pair i and 2i + 1 on its wrong one, which a pair may lack.
    """

    def __init__(self, pad_token_id: int) -> None:
        self._collate = DistillationCollator(pad_token_id)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        lines, sequences = [], []
        for pair, row in enumerate(rows):
            lines.append({name: row[name] for name in ANSWER})
            sequences.append(2 * pair)
            if row["rejected_input_ids"]:
                lines.append({name: row[f"rejected_{name}"] for name in ANSWER})
                sequences.append(2 * pair + 1)
        batch = self._collate(lines)
        return {**batch, "sequence": torch.tensor(sequences)[batch["sequence"]]}

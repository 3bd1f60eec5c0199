"""Scored positions: the shift, packed rows, padding."""

from __future__ import annotations

from datasets import Dataset

from kdlib.data.collate import DistillationCollator
from kdlib.data.positions import causal_positions

ROWS = [
    {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8], "sample_id": 11},
    {"input_ids": [5, 9], "labels": [5, 9], "sample_id": 12},
]


def test_token_t_predicts_label_t_plus_1() -> None:
    batch = DistillationCollator(pad_token_id=0)(ROWS)
    found = causal_positions(batch)
    assert found.index.tolist() == [1, 2, 4]
    assert found.labels.tolist() == [7, 8, 9]
    assert found.sequence.tolist() == [0, 0, 1]


def test_no_position_predicts_the_next_sample_of_a_packed_row() -> None:
    packed = {
        "input_ids": [5, 9, 5, 6, 7, 8],
        "labels": [5, 9, 5, -100, 7, 8],  # 5 begins the second sample, whose own row would not score it
        "sample_id": [12, 11],
        "seq_lengths": [2, 4],
    }
    batch = DistillationCollator(pad_token_id=0, pad_to_multiple_of=8)([packed, packed])
    found = causal_positions(batch)
    assert found.index.tolist() == [0, 3, 4, 8, 11, 12]
    assert found.labels.tolist() == [9, 7, 8, 9, 7, 8]
    assert found.sequence.tolist() == [0, 1, 1, 2, 3, 3]


def test_nothing_scored_gives_no_positions() -> None:
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, -100], "sample_id": 3}])
    assert len(causal_positions(DistillationCollator(pad_token_id=0)(rows.to_list()))) == 0

"""Batches, and that packing them changes nothing a model computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import LlamaForCausalLM

from kdlib.data import DistillationCollator, causal_positions, prepare_dataset
from tests.tiny import tiny_llama, tiny_tokenizer

PLAIN = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "sample_id": 11},
    {"input_ids": [8, 9, 10, 11, 12], "labels": [-100, -100, 10, 11, 12], "sample_id": 22},
]
PACKED = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2], "sample_id": [1, 2]},
    {"input_ids": [10, 11], "labels": [-100, 11], "seq_lengths": [2], "sample_id": [3]},
]


def test_plain_rows_are_padded_on_the_right() -> None:
    batch = DistillationCollator(0)(PLAIN)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0, 0], [8, 9, 10, 11, 12]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, -100], [-100, -100, 10, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["sequence"].tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["sample_id"].tolist() == [11, 22]
    assert "position_ids" not in batch
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (5, 5), (8, 8), (3, 6)])
def test_width_is_a_multiple(multiple: int | None, width: int) -> None:
    batch = DistillationCollator(0, pad_to_multiple_of=multiple)(PLAIN)
    for name in ("input_ids", "labels", "attention_mask", "sequence"):
        assert batch[name].shape == (2, width)


def test_packed_rows_restart_positions_and_score_no_first_token() -> None:
    batch = DistillationCollator(0)(PACKED)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 11, -100, -100, -100]]
    assert batch["sequence"].tolist() == [[0, 0, 0, 1, 1], [2, 2, 2, 2, 2]]
    assert batch["sample_id"].tolist() == [1, 2, 3]
    assert "attention_mask" not in batch


@pytest.mark.parametrize("rows", [PLAIN, PACKED])
def test_flattened_rows_are_one_row_without_padding(rows: list[dict[str, Any]]) -> None:
    batch = DistillationCollator(0, flatten=True)(rows)
    assert batch["input_ids"].tolist() == [[token for row in rows for token in row["input_ids"]]]
    assert batch["labels"][batch["position_ids"] == 0].tolist() == [-100] * len(batch["sample_id"])
    starts = (batch["position_ids"] == 0).cumsum(dim=1) - 1
    assert torch.equal(batch["sequence"], starts)


def test_the_rows_are_left_alone() -> None:
    DistillationCollator(0)(PACKED)
    assert PACKED[0]["labels"] == [5, 6, 7, 8, 9]


def texts() -> Dataset:
    sentences = [
        "Is the sky blue? Yes.",
        "two",
        "She had seven apples and ate three.",
        "four",
        "The answer is four.",
    ]
    return Dataset.from_list([{"text": text} for text in sentences])


def rows_of(*, packing: bool) -> list[dict[str, Any]]:
    return list(prepare_dataset(texts(), tiny_tokenizer(), max_length=24, packing=packing).dataset)


def scored_logits(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> dict[int, Tensor]:
    """The logits that predict each sample's scored tokens, by sample id."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits.flatten(0, 1)
    positions = causal_positions(batch)
    return {
        int(sample): logits[positions.index[positions.sequence == index]] for index, sample in enumerate(batch["sample_id"])
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("flatten", [False, True])
def test_packed_logits_are_those_of_the_samples_alone(attention: str, flatten: bool) -> None:
    model = tiny_llama(len(tiny_tokenizer()), attn_implementation=attention)
    packed = scored_logits(model, DistillationCollator(0, flatten=flatten, pad_to_multiple_of=8)(rows_of(packing=True)))
    alone = {}
    for row in rows_of(packing=False):
        alone |= scored_logits(model, DistillationCollator(0)([row]))
    assert packed.keys() == alone.keys() and len(alone) == 5
    for sample, logits in alone.items():
        assert len(logits) > 0
        torch.testing.assert_close(packed[sample], logits, rtol=1e-5, atol=1e-5)


def test_the_comparison_sees_a_leak() -> None:
    """With running positions, so without boundaries, packed logits differ by far more than the tolerance."""
    model = tiny_llama(len(tiny_tokenizer()))
    batch = DistillationCollator(0, flatten=True)(rows_of(packing=True))
    apart = scored_logits(model, batch)
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    leaked = scored_logits(model, batch)
    assert max((apart[sample] - leaked[sample]).abs().max() for sample in apart) > 1e-2


def test_padded_logits_are_those_of_the_samples_alone() -> None:
    model = tiny_llama(len(tiny_tokenizer()))
    rows = rows_of(packing=False)
    together = scored_logits(model, DistillationCollator(0)(rows))
    for row in rows:
        alone = scored_logits(model, DistillationCollator(0)([row]))[row["sample_id"]]
        torch.testing.assert_close(together[row["sample_id"]], alone, rtol=1e-5, atol=1e-5)

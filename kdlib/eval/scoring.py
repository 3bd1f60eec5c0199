"""Scored positions of rows under one or more models, chunk by chunk: logits of all positions never exist at
once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from kdlib.data.rows import Prepared, prepare_dataset
from kdlib.models import check_head, hidden_states
from kdlib.types import Head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # rows of logits [CHUNK, V] held at a time, per model


@dataclass(frozen=True, kw_only=True)
class ScoredChunk:
    """n scored positions: ``row`` [n] of the dataset, ``target`` [n], ``logits`` [n, V] of each model."""

    row: Tensor
    target: Tensor
    logits: list[Tensor]


def token_rows(
    rows: Dataset | Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    max_length: int | None,
    chat_template_kwargs: Mapping[str, Any] | None,
) -> Prepared:
    """Rows of any kind -> token rows; ``max_length`` defaults to the positions the model has."""
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list([dict(row) for row in rows])
    longest = max_length or model.config.get_text_config().max_position_embeddings
    return prepare_dataset(dataset, tokenizer, max_length=longest, chat_template_kwargs=chat_template_kwargs)


def scored_chunks(
    models: Sequence[Any], dataset: Dataset, *, vocab_size: int, batch_size: int, desc: str
) -> Iterator[ScoredChunk]:
    """Every scored position of ``dataset`` once, longest rows first; the models are expected in eval mode.

    The hidden state at position t predicts ``labels[t + 1]``. Heads are cut to ``vocab_size`` entries, so
    padding entries get no probability; logits are float32 (float64 for float64 models) on the first model's
    device.
    """
    for model in models:
        check_head(model, role="model")
    heads = [Head.of(model, vocab_size=vocab_size) for model in models]
    for picked, inputs, labels in padded_batches(dataset, batch_size=batch_size, desc=desc):
        scored = labels[:, 1:] != -100
        hidden = [_last_hidden(model, inputs)[:, :-1][scored] for model in models]
        row, target = picked[scored.nonzero()[:, 0]], labels[:, 1:][scored]
        for chunk in (slice(i, i + CHUNK) for i in range(0, len(row), CHUNK)):
            logits = [head(states[chunk]) for head, states in zip(heads, hidden, strict=True)]
            device = logits[0].device
            yield ScoredChunk(row=row[chunk], target=target[chunk].to(device), logits=[z.to(device) for z in logits])


def padded_batches(dataset: Dataset, *, batch_size: int, desc: str) -> Iterator[tuple[Tensor, dict[str, Tensor], Tensor]]:
    """(rows of the dataset [B], ``input_ids`` and ``attention_mask`` [B, S], labels [B, S]), longest rows first, on the CPU."""
    lengths = [len(ids) for ids in dataset["input_ids"][:]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in tqdm(range(0, len(order), batch_size), desc=desc, unit="batch"):
        picked = order[start : start + batch_size]
        batch = dataset[picked]
        inputs = {
            "input_ids": _padded(batch["input_ids"], 0),
            "attention_mask": _padded([[1] * len(ids) for ids in batch["input_ids"]], 0),
        }
        yield torch.tensor(picked), inputs, _padded(batch["labels"], -100)


def _last_hidden(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    return hidden_states(model, {name: value.to(model.device) for name, value in inputs.items()})[0]


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """[B, S] int64, filled up on the right."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)

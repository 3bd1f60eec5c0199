"""The logits of an EAGLE-3 head and its target at the tokens of given rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from kdlib.decoding.eagle_drafter import EagleDrafter
from kdlib.eval.scoring import CHUNK, ScoredChunk, padded
from kdlib.models import hidden_states
from kdlib.types import Head


def head_chunks(target: Any, drafter: EagleDrafter, dataset: Dataset, *, batch_size: int, desc: str) -> Iterator[ScoredChunk]:
    """Every scored token from the third of its row on, as ``scored_chunks`` gives them: logits of target, then of the head.

    The head reads the target's features f_{t-2} with token t-1 to say token t, as it does at the first position of a round;
    its logits are over the target's vocabulary, -inf outside of its own.
    """
    head = Head.of(target)
    lengths = [len(ids) for ids in dataset["input_ids"][:]]
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in tqdm(range(0, len(order), batch_size), desc=desc, unit="batch"):
        picked = order[start : start + batch_size]
        batch = dataset[picked]
        labels = padded(batch["labels"], -100)[:, 2:]
        scored, device = labels != -100, next(target.parameters()).device
        inputs = {
            "input_ids": padded(batch["input_ids"], 0).to(device),
            "attention_mask": padded([[1] * len(ids) for ids in batch["input_ids"]], 0).to(device),
        }
        hidden, features = hidden_states(target, inputs, layers=drafter.layers)
        fused = torch.cat([features[layer] for layer in drafter.layers], -1)
        drafted: Tensor = drafter.draft.unroll(fused, inputs["input_ids"], steps=1)[0]
        # the head at t-2 and the target at t-1 speak of the same token
        ours, theirs = hidden[:, 1:-1][scored], drafted[:, : labels.shape[1]][scored]
        row = torch.tensor(picked)[scored.nonzero()[:, 0]]
        for chunk in (slice(i, i + CHUNK) for i in range(0, len(row), CHUNK)):
            logits = [head(ours[chunk]), drafter.target_logits(theirs[chunk])]
            yield ScoredChunk(row=row[chunk], target=labels[scored][chunk].to(device), logits=logits)

"""The logits of an EAGLE-3 head and its target at the tokens of given rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset

from kdlib.decoding.eagle_drafter import EagleDrafter
from kdlib.eval.scoring import CHUNK, ScoredChunk, padded_batches
from kdlib.models import hidden_states
from kdlib.types import Head


def head_chunks(target: Any, drafter: EagleDrafter, dataset: Dataset, *, batch_size: int, desc: str) -> Iterator[ScoredChunk]:
    """Every scored token from the third of its row on, as ``scored_chunks`` gives them: logits of target, then of the head.

    The head reads the target's features f_{t-2} with token t-1 to say token t, as it does at the first position of a round;
    its logits are over the target's vocabulary, -inf outside of its own.
    """
    head, device = Head.of(target), next(target.parameters()).device
    for picked, inputs, labels in padded_batches(dataset, batch_size=batch_size, desc=desc):
        tokens = labels[:, 2:]
        scored, ids = tokens != -100, inputs["input_ids"].to(device)
        batch = {"input_ids": ids, "attention_mask": inputs["attention_mask"].to(device)}
        hidden, features = hidden_states(target, batch, layers=drafter.layers)
        drafted = drafter.draft.unroll(torch.cat([features[layer] for layer in drafter.layers], -1), ids, steps=1)[0]
        # the head at t-2 and the target at t-1 speak of the same token
        ours, theirs = hidden[:, 1:-1][scored], drafted[:, : tokens.shape[1]][scored]
        row, said = picked[scored.nonzero()[:, 0]], tokens[scored].to(device)
        for chunk in (slice(i, i + CHUNK) for i in range(0, len(row), CHUNK)):
            logits = [head(ours[chunk]), drafter.target_logits(theirs[chunk])]
            yield ScoredChunk(row=row[chunk], target=said[chunk], logits=logits)

"""What drawing rollouts holds: the cache of keys and values when completions are longest, and one pass beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdlib.cli.planning.live import LiveBytes, twin
from kdlib.data.rollout_rows import prompt_ids

KV_CACHE, PASS = "key-value cache", "decoding pass"
# A drawn token's logits: as the model gives them, in float32, as log-probs, as probabilities, and summed up in float64.
LOGIT_BYTES = 4 + 4 + 4 + 4 + 8


def drawn_at_once(trainer: Any) -> int:
    """Completions that are drawn together: all of an optimizer step's, or ``generation_batch_size``."""
    args = trainer.args
    rows: int = args.train_batch_size * args.gradient_accumulation_steps
    return min(rows, args.generation_batch_size or rows)


def traced_rollouts(trainer: Any, rows: list[dict[str, Any]]) -> dict[str, int]:
    """Bytes of the cache at its end and of the pass beside it, for ``rows`` drawn at once with the student in this process.

    The prompts are read on tensors without memory, which gives the bytes of a cached token for every architecture.
    """
    longest = max(len(prompt_ids(row)) for row in rows)
    total = min(longest + trainer.args.max_completion_length, trainer.on_policy.rollouts.context)
    mode, live = FakeTensorMode(), LiveBytes()
    model, device = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.device
    student = twin(model, mode, device=device).eval()
    live.known([*student.parameters(), *student.buffers()])
    with mode, live, torch.no_grad(), trainer.accelerator.autocast():
        ids = torch.zeros(len(rows), longest, dtype=torch.long, device=device)
        cache: Any = student(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        held, reading = live.now.total(), sum(live.at_most.values())
        layers = len(cache.layers)
    at_end = held * total // longest
    # a layer's cache is written anew, one token longer, while the old one is still there
    decoding = at_end // layers + len(rows) * trainer.vocab_size * LOGIT_BYTES
    return {KV_CACHE: at_end, PASS: max(decoding, reading - at_end)}

"""Tiny masked diffusion models, and the likelihood bound by full enumeration."""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

import torch

from kdlib.diffusion import DiffusionSpec, as_diffusion
from tests.tiny import tiny_llama

MASK = 20


def tiny_diffusion(vocab_size: int = 24, *, mask_token_id: int = MASK, seed: int = 0, **spec: Any) -> Any:
    """A random Llama that reads both ways, with its spec in the configuration."""
    model = tiny_llama(vocab_size, seed=seed)
    return as_diffusion(model, DiffusionSpec(mask_token_id=mask_token_id, eos_token_id=2, **spec)).eval()


@torch.no_grad()
def enumerated(model: Any, ids: list[int], scored: list[int], *, spec: DiffusionSpec) -> float:
    """E_k E_M [T / k sum_{i in M} log q(x_i | rest)] over every set M, by one pass each; attention is full."""
    total, found = len(scored), 0.0
    for size in range(1, total + 1):
        for chosen in combinations(scored, size):
            noisy = torch.tensor([ids])
            noisy[0, list(chosen)] = spec.mask_token_id
            logits = model(input_ids=noisy, use_cache=False).logits[0].double().log_softmax(-1)
            said = sum(float(logits[i - spec.shift, ids[i]]) for i in chosen)
            found += said * total / size / comb(total, size) / total
    return found

"""Whether an engine has the weights it was sent: its log-probs of a few tokens against the student's."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kdlib.types import Sampler


class StaleEngineError(ValueError):
    """The rollout engine does not have the student's weights; going on would train on another model's samples."""


def probe_sequences(vocab_size: int, seed: int, *, count: int = 4, length: int = 12) -> list[list[int]]:
    """``count`` sequences of random ids, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = torch.randint(vocab_size, (count, length), generator=generator).tolist()
    return ids


def verify_sync(
    sampler: Sampler, expected: Sequence[Sequence[float]], sequences: Sequence[list[int]], *, tolerance: float
) -> float:
    """The largest |engine - student| over log q(x_t | x_<t) of ``sequences``, in nats; ``expected``: the student's own.

    Raises StaleEngineError when it is above ``tolerance``, or not a number.
    """
    found = sampler.score(list(sequences))
    assert [len(row) for row in found] == [len(row) for row in expected]
    pairs = [pair for ours, theirs in zip(found, expected, strict=True) for pair in zip(ours, theirs, strict=True)]
    difference = (torch.tensor(pairs, dtype=torch.float64).diff(dim=-1)).abs().max().item()
    if not difference <= tolerance:
        raise StaleEngineError(
            f"after a weight sync the rollout engine's log-probs differ from the student's by {difference:.3g} nats "
            f"(rollout.sync_tolerance {tolerance:g}): the engine still has old weights. vLLM on CPU does this when input and "
            "output embeddings are tied: give them tensors of their own with kdlib.samplers.untie(model), or use "
            "rollout.engine hf; an engine that computes in 16 bits wants a tolerance of 0.2"
        )
    return difference

"""Offline rows and the student's own samples, mixed by how the student's entropy changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from kdlib.trainers.config import DistillationConfig

Batch = Mapping[str, Any]
DECAY = 0.9  # of the running mean: ten steps, so that one odd batch does not move the mixture


class EntropyMixture:
    """The share of on-policy rows: low + (high - low) min(1, H / H_0), H the student's entropy, H_0 that of the first step.

    H is a running mean of -log q of the tokens that the student draws, nats, an unbiased estimate of the entropy of what it
    draws from, counted over all processes. Training on own samples sharpens the student (it recalls), text of another widens
    it (it extends): where entropy has fallen, the share falls and more of the teacher's text comes in; it rises again with it.

    After Recall-Extend Dynamics (arXiv 2508.16677), which weighs its offline loss up by the ratio of entropy changes on offline
    and online data. Its formula is not this one: here the share of rows follows, linearly and within bounds.
    """

    def __init__(self, *, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.start: float | None = None
        self.now: float | None = None

    @property
    def share(self) -> float:
        """The share of the rows of the next step."""
        if self.start is None or self.now is None or self.start <= 0.0:
            return self.high
        return self.low + (self.high - self.low) * min(1.0, self.now / self.start)

    def update(self, batches: Iterable[Batch], accelerator: Any) -> None:
        """Takes in a step's batches, whose ``drawn_logp`` [B, S] is NaN where nothing was drawn; every process calls this."""
        drawn = [batch["drawn_logp"] for batch in batches if "drawn_logp" in batch]
        found = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        for logp in drawn:
            known = logp[~logp.isnan()].double()
            found += torch.stack([-known.sum(), known.new_tensor(len(known))])
        total, count = accelerator.reduce(found, reduction="sum").tolist()
        if not count:
            return
        entropy = total / count
        self.start = entropy if self.start is None else self.start
        self.now = entropy if self.now is None else DECAY * self.now + (1.0 - DECAY) * entropy

    @property
    def state(self) -> dict[str, float | None]:
        return {"start": self.start, "now": self.now}

    def restore(self, saved: Mapping[str, float | None]) -> None:
        """As a checkpoint left it."""
        self.start, self.now = saved["start"], saved["now"]

    @property
    def metrics(self) -> dict[str, float]:
        """The share of the next step and the running entropy."""
        return {"mixture/on_policy": self.share} | ({} if self.now is None else {"mixture/entropy": self.now})


def mixture_of(args: DistillationConfig) -> EntropyMixture | None:
    """What ``on_policy_minimum`` asks for; ValueError where the student's own samples do not tell its entropy."""
    if args.on_policy_minimum is None:
        return None
    if args.rollout_source != "student" or args.rollout.temperature == 0:
        raise ValueError(
            "on_policy_minimum follows the entropy of what the student draws: it needs rollout_source student and a "
            "rollout.temperature above 0"
        )
    return EntropyMixture(low=args.on_policy_minimum, high=args.on_policy_fraction)

"""Completions that take the place of a dataset's own: what is trained on is what a model says itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kdlib.data.rollout_rows import prompt_ids, with_completion
from kdlib.keys import draw_key
from kdlib.types import Completion, Sampler, SamplingParams

Row = dict[str, Any]
Correct = Callable[[Sequence[Row], Sequence[Completion], Sequence[int]], list[Row]]

_COIN, _DRAW = 1, 2  # what a key is for: one row's coin and its draws must not be the same number


@dataclass(kw_only=True)
class RolloutCounts:
    """What happened to the rows of a step, on this process."""

    completions: int = 0
    tokens: int = 0
    clipped: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def skip(self, reason: str) -> None:
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def metrics(self, device: torch.device) -> dict[str, tuple[Tensor, int]]:
        """{name: (sum, count)}: mean length in tokens, share cut at the limit, share of rows that got none."""
        asked = self.completions + sum(self.skipped.values())
        sums = {
            "completions/mean_length": (self.tokens, self.completions),
            "completions/clipped_ratio": (self.clipped, self.completions),
            "completions/skipped_ratio": (asked - self.completions, asked),
        }
        return {name: (torch.tensor(float(total), device=device), count) for name, (total, count) in sums.items() if count}


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Draws completions for the rows of an optimizer step.

    A row gets one when its coin, keyed by (seed, step, prompt, generation), falls below ``fraction``; its draw is keyed in the
    same way, so neither depends on batches, accumulation, processes or the completion that is discarded. ``context``: tokens
    that a prompt with its completion may take. ``correct`` rewrites drawn rows.
    """

    sampler: Sampler
    params: SamplingParams
    fraction: float
    seed: int
    context: int
    own: bool = True  # drawn by the student, so that their log-probs are of use to the loss
    correct: Correct | None = None

    def __call__(self, rows: Sequence[Row], *, step: int) -> tuple[list[Row], RolloutCounts]:
        """The rows, those of the coin with a completion of this step; one that cannot have one is left unscored and counted."""
        made, counts = list(rows), RolloutCounts()
        chosen = [i for i, row in enumerate(rows) if not row.get("repeated") and self._coin(row, step) < self.fraction]
        for i in [i for i in chosen if len(prompt_ids(rows[i])) >= self.context]:
            counts.skip("the prompt fills the context")
            made[i] = unscored(rows[i])
            chosen.remove(i)
        seeds = [row_key(self.seed, step, rows[i], purpose=_DRAW) for i in chosen]
        prompts = [prompt_ids(rows[i]) for i in chosen]
        completions = self.sampler.generate(prompts, self.params, seeds=seeds) if prompts else []
        completions = [self._fitting(c, room=self.context - len(p)) for c, p in zip(completions, prompts, strict=True)]
        answered = [n for n, completion in enumerate(completions) if completion.ids]
        for n in sorted(set(range(len(chosen))) - set(answered)):
            counts.skip("nothing was generated")
            made[chosen[n]] = unscored(rows[chosen[n]])
        replaced = self._replaced(
            [rows[chosen[n]] for n in answered], [completions[n] for n in answered], [seeds[n] for n in answered]
        )
        for n, row in zip(answered, replaced, strict=True):
            made[chosen[n]] = row
            counts.completions += 1
            counts.tokens += len(completions[n].ids)
            counts.clipped += completions[n].finish == "length"
        return made, counts

    def _fitting(self, completion: Completion, *, room: int) -> Completion:
        """Cut to what every model involved can read."""
        if len(completion.ids) <= room:
            return completion
        return Completion(ids=completion.ids[:room], logp=completion.logp[:room], finish="length")

    def _replaced(self, rows: list[Row], completions: list[Completion], seeds: list[int]) -> list[Row]:
        if self.correct is not None:
            return self.correct(rows, completions, seeds)
        return [
            with_completion(row, completion.ids, logp=completion.logp if self.own and self.params.log_probs else None)
            for row, completion in zip(rows, completions, strict=True)
        ]

    def _coin(self, row: Row, step: int) -> float:
        return row_key(self.seed, step, row, purpose=_COIN) / 2**63


def row_key(seed: int, step: int, row: Mapping[str, Any], *, purpose: int) -> int:
    """A 63-bit key of (seed, optimizer step, prompt, which of its generations, what for)."""
    return draw_key(seed, step, row.get("generation", 0), purpose, *prompt_ids(row))


def unscored(row: Row) -> Row:
    """The row with nothing of it scored, so that a batch keeps its shape."""
    return {**row, "labels": [-100] * len(row["labels"])}

"""Before and after: two drafts of one target on the same prompts, which are resampled together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kdlib.eval.acceptance_expected import DraftSampling
from kdlib.eval.acceptance_measurement import AcceptanceResult
from kdlib.eval.acceptance_statistics import Estimate, ratio_change

RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Change:
    """after / before - 1 of ``metric``; ``num_speculative_tokens`` is None for the expected acceptance."""

    after: str
    before: str
    metric: str
    draft_sample_method: DraftSampling
    num_speculative_tokens: int | None
    change: Estimate

    @property
    def line(self) -> str:
        run = "" if self.num_speculative_tokens is None else f"num_speculative_tokens {self.num_speculative_tokens}, "
        value = f"{self.change.value:+.1%}" if math.isfinite(self.change.value) else "(none before)"
        bounds = ""
        if self.change.low is not None and self.change.high is not None:
            bounds = f" [{self.change.low:+.1%}, {self.change.high:+.1%}]"
        return f"{self.after} against {self.before}, {run}{self.draft_sample_method}: {self.metric} {value}{bounds}"

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "change": self.change.to_json()}


def changes(results: Mapping[str, AcceptanceResult]) -> list[Change]:
    """The last draft of ``results`` against each earlier one, all of them measured on the same prompts with the same gammas."""
    *earlier, (name, after) = results.items()
    return [change for other, before in earlier for change in _pair(name, other, after=after, before=before)]


def _pair(name: str, other: str, *, after: AcceptanceResult, before: AcceptanceResult) -> list[Change]:
    chance = {"resamples": RESAMPLES, "seed": after.settings["seed"]}
    found = []
    for way in after.expected:
        change = ratio_change(after.expected[way].sums, before.expected[way].sums, **chance)
        found.append(_of("expected acceptance_rate", name, other, way=way, gamma=None, change=change))
    for run, base in zip(after.empirical, before.empirical, strict=True):
        for metric, plus in (("accepted draft tokens per round", 0.0), ("acceptance_length", 1.0)):
            change = ratio_change(run.counters.per_round, base.counters.per_round, plus=plus, **chance)
            gamma = run.num_speculative_tokens
            found.append(_of(metric, name, other, way=run.draft_sample_method, gamma=gamma, change=change))
    return found


def _of(metric: str, after: str, /, before: str, *, way: DraftSampling, gamma: int | None, change: Estimate) -> Change:
    return Change(
        after=after, before=before, metric=metric, draft_sample_method=way, num_speculative_tokens=gamma, change=change
    )

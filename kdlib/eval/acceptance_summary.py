"""Expected acceptance as numbers to read: overall, per prompt, by domain, and along the response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdlib.eval.acceptance_expected import DraftSampling, PositionValues, along_response, per_prompt
from kdlib.eval.acceptance_statistics import Estimate, Sums, ratio, sums


@dataclass(frozen=True, kw_only=True)
class Domain:
    """Expected acceptance in the responses to one kind of prompt."""

    acceptance_rate: Estimate
    prompts: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Expected:
    """Probability that a drafted token is kept, over all positions of the target's own responses.

    ``acceptance_rate``: mean over tokens, the number that serving adds up; ``mean_over_prompts``: mean over prompts of their
    means. ``tokens``: positions counted, ``dropped``: those without a finite value, which are not. ``sums``: per prompt.
    """

    acceptance_rate: Estimate
    mean_over_prompts: Estimate
    by_domain: dict[str, Domain]
    along_response: list[dict[str, Any]]
    tokens: int
    dropped: int
    sums: Sums = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        domains = {
            name: {"acceptance_rate": found.acceptance_rate.to_json(), "prompts": found.prompts, "tokens": found.tokens}
            for name, found in self.by_domain.items()
        }
        return {
            "acceptance_rate": self.acceptance_rate.to_json(),
            "mean_over_prompts": self.mean_over_prompts.to_json(),
            "by_domain": domains,
            "along_response": self.along_response,
            "tokens": self.tokens,
            "dropped": self.dropped,
        }


def summarise(
    values: PositionValues, method: DraftSampling, *, domains: Sequence[str | None], resamples: int, seed: int
) -> Expected:
    """``domains``: of each prompt, None where unknown. Raises ValueError when no position is finite."""
    found = sums(*per_prompt(values, method, prompts=len(domains)))
    chance = {"resamples": resamples, "seed": seed}
    overall = ratio(found, **chance)
    used = found[found.per > 0]
    names = sorted({domain for domain in domains if domain is not None})
    return Expected(
        acceptance_rate=overall,
        mean_over_prompts=ratio(sums(used.of / used.per, np.ones_like(used.per)), **chance),
        by_domain={name: of for name in names if (of := _domain(found, name, domains=domains, **chance)) is not None},
        along_response=along_response(values, method),
        tokens=int(found.per.sum()),
        dropped=values.dropped,
        sums=found,
    )


def _domain(found: Sums, name: str, *, domains: Sequence[str | None], resamples: int, seed: int) -> Domain | None:
    chosen = found[np.array([domain == name for domain in domains])]
    tokens = int(chosen.per.sum())
    if tokens == 0:
        return None
    return Domain(
        acceptance_rate=ratio(chosen, resamples=resamples, seed=seed), prompts=int((chosen.per > 0).sum()), tokens=tokens
    )

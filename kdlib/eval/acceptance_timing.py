"""The wall-time model beside the clock: what the measured costs predict, and tokens per second with and without the draft."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel

from kdlib.decoding.sampling import context_length, generate
from kdlib.eval.acceptance_empirical import Decoded, Decoding, speculate
from kdlib.eval.acceptance_expected import DraftSampling
from kdlib.eval.costs import Costs, measure_costs
from kdlib.eval.speedup import best_gamma, speedup
from kdlib.keys import draw_key

LARGEST_GAMMA = 8  # gammas up to this are asked whether they would pay, also those that were not decoded


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Tokens per second of one prompt at a time: all new tokens over all time, prefill included, on the same prompts.

    ``predicted_speedup``: acceptance_length / (gamma c + v), which leaves prefill and bookkeeping out; None without costs.
    """

    num_speculative_tokens: int
    draft_sample_method: DraftSampling
    tokens_per_second: float
    measured_speedup: float
    predicted_speedup: float | None

    @property
    def model_error(self) -> float | None:
        """(predicted - measured) / measured."""
        return None if self.predicted_speedup is None else self.predicted_speedup / self.measured_speedup - 1.0


@dataclass(frozen=True, kw_only=True)
class Best:
    """The gamma up to LARGEST_GAMMA with the largest predicted speed-up at i.i.d. acceptance ``acceptance_rate``."""

    num_speculative_tokens: int
    predicted_speedup: float
    acceptance_rate: float

    @property
    def pays(self) -> bool:
        return self.predicted_speedup > 1.0


@dataclass(frozen=True, kw_only=True)
class Timing:
    """``costs`` is None for a draft that is no causal language model; ``best`` is then empty."""

    prompts: int
    target_tokens_per_second: float
    speeds: tuple[Speed, ...]
    costs: Costs | None
    best: Mapping[DraftSampling, Best]

    def to_json(self) -> dict[str, Any]:
        costs = None if self.costs is None else {**asdict(self.costs), "c": self.costs.c, "v": self.costs.v}
        return {
            "prompts": self.prompts,
            "target_tokens_per_second": self.target_tokens_per_second,
            "speeds": [{**asdict(speed), "model_error": speed.model_error} for speed in self.speeds],
            "costs": costs,
            "best": {method: asdict(best) for method, best in self.best.items()},
        }


def measure_timing(
    decoding: Decoding,
    prompts: Sequence[list[int]],
    *,
    keys: Sequence[int],
    decoded: Sequence[Decoded],
    alphas: Mapping[DraftSampling, float],
    response_length: float,
) -> Timing:
    """Costs of forward passes in the middle of a response of ``response_length`` tokens, then each prompt by itself.

    The target alone and every way of speculation take turns on a prompt, so that a slow moment of the machine hits all.
    """
    gammas = sorted({*range(1, LARGEST_GAMMA + 1), *(found.num_speculative_tokens for found in decoded)})
    context = round(sum(map(len, prompts)) / len(prompts) + response_length / 2)
    costs = _costs(decoding, gammas, context=context)
    single = replace(decoding, batch_size=1)
    runs: list[Decoded | None] = [None, *decoded]
    for run in runs:
        _run(single, prompts[0], key=keys[0], run=run)  # the first call pays for what later ones find ready
    tokens, seconds = [0] * len(runs), [0.0] * len(runs)
    for ids, key in tqdm(list(zip(prompts, keys, strict=True)), desc="Timing", unit="prompt"):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            tokens[index] += _run(single, ids, key=key, run=run)
            seconds[index] += time.perf_counter() - start
    rates = [n / taken for n, taken in zip(tokens, seconds, strict=True)]
    speeds = [_speed(found, rate, rates[0], costs) for found, rate in zip(decoded, rates[1:], strict=True)]
    best = {} if costs is None else {method: _best(alpha, costs, gammas) for method, alpha in alphas.items()}
    return Timing(prompts=len(prompts), target_tokens_per_second=rates[0], speeds=tuple(speeds), costs=costs, best=best)


def pays_line(timing: Timing, *, method: DraftSampling) -> str:
    """One sentence: which gamma to set, or that none pays and why."""
    best, costs = timing.best[method], timing.costs
    assert costs is not None
    share = f"a draft step costs c = {costs.c:.2f} of a target step"
    if costs.c >= best.acceptance_rate:
        return f"{method} drafts: no gamma pays, {share}, and the acceptance rate is {best.acceptance_rate:.3f}, not above c"
    if not best.pays:
        v = costs.v[best.num_speculative_tokens]
        return (
            f"{method} drafts: no gamma pays, the best (num_speculative_tokens {best.num_speculative_tokens}) "
            f"is predicted at {best.predicted_speedup:.2f}x; {share}, verification v = {v:.2f}"
        )
    return (
        f"{method} drafts: num_speculative_tokens {best.num_speculative_tokens} is predicted best, "
        f"{best.predicted_speedup:.2f}x; {share}"
    )


def _run(decoding: Decoding, ids: list[int], *, key: int, run: Decoded | None) -> int:
    """New tokens of one prompt, by the target alone (``run`` None) or with the draft; reading their number ends the work."""
    if run is None:
        seeds = [draw_key(decoding.seed, key)]
        found = generate(decoding.target, [ids], decoding.params, seeds=seeds, pad_token_id=decoding.pad_token_id)
        return len(found[0].ids)
    gamma, method = run.num_speculative_tokens, run.draft_sample_method
    return int(speculate(decoding, [ids], keys=[key], gamma=gamma, method=method).lengths.sum())


def _costs(decoding: Decoding, gammas: Sequence[int], *, context: int) -> Costs | None:
    """At ``context`` tokens, or as many as leave room for the passes that are timed."""
    if not isinstance(decoding.draft, PreTrainedModel):
        return None
    limit = min(context_length(decoding.target), context_length(decoding.draft)) - max(gammas) - 1
    return measure_costs(decoding.target, decoding.draft, gammas=gammas, context=int(min(context, limit)))


def _speed(found: Decoded, rate: float, alone: float, costs: Costs | None) -> Speed:
    gamma, length = found.num_speculative_tokens, found.acceptance_length.value
    predicted = None if costs is None else speedup(length, gamma=gamma, c=costs.c, v=costs.v[gamma])
    return Speed(
        num_speculative_tokens=gamma,
        draft_sample_method=found.draft_sample_method,
        tokens_per_second=rate,
        measured_speedup=rate / alone,
        predicted_speedup=predicted,
    )


def _best(alpha: float, costs: Costs, gammas: Sequence[int]) -> Best:
    gamma, predicted = best_gamma(alpha, c=costs.c, v=costs.v, gammas=gammas)
    return Best(num_speculative_tokens=gamma, predicted_speedup=predicted, acceptance_rate=alpha)

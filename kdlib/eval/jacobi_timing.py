"""Tokens per second of Jacobi decoding and of plain greedy decoding, on the machine that measures."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kdlib.decoding.sampling import generate
from kdlib.eval.acceptance_statistics import Array, Estimate, Sums, ratio_change
from kdlib.eval.jacobi_decoder import JacobiDecoder, Request
from kdlib.eval.machine import machine_of
from kdlib.types import SamplingParams

Job = Callable[[list[int]], tuple[int, int]]  # a prompt -> its new tokens and the passes they took, the prompt's left out


@dataclass(frozen=True, kw_only=True)
class JacobiTiming:
    """One prompt at a time on ``machine``: all new tokens over all seconds, the prompt's pass included in the seconds.

    ``speedup``: ratio of the two rates with its interval over prompts. ``forwards`` and ``greedy_forwards``: passes over the
    same prompts, without the prompts' own.
    """

    machine: str
    prompts: int
    tokens_per_second: float
    greedy_tokens_per_second: float
    speedup: Estimate
    forwards: int
    greedy_forwards: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "speedup": self.speedup.to_json()}


def measure_jacobi_timing(
    request: Request, decoder: JacobiDecoder, prompts: Sequence[list[int]], *, resamples: int, seed: int
) -> JacobiTiming:
    """Both ways take turns on each prompt, so that a slow moment of the machine hits both; a first round is not counted."""
    jobs = [_jacobi(replace(request, batch_size=1), decoder), _greedy(request)]
    for job in jobs:
        job(prompts[0])
    found = np.zeros((len(jobs), len(prompts), 3))  # new tokens, passes, seconds
    for column, ids in enumerate(tqdm(prompts, desc="Timing", unit="prompt")):
        for index, job in enumerate(jobs):
            start = time.perf_counter()
            tokens, passes = job(ids)
            found[index, column] = tokens, passes, time.perf_counter() - start
    ours, greedy = (_rate(of) for of in found)
    change = ratio_change(ours, greedy, resamples=resamples, seed=seed)
    low, high = (None if bound is None else 1.0 + bound for bound in (change.low, change.high))
    return JacobiTiming(
        machine=machine_of(request.model),
        prompts=len(prompts),
        tokens_per_second=float(ours.of.sum() / ours.per.sum()),
        greedy_tokens_per_second=float(greedy.of.sum() / greedy.per.sum()),
        speedup=Estimate(value=1.0 + change.value, low=low, high=high),
        forwards=int(found[0, :, 1].sum()),
        greedy_forwards=int(found[1, :, 1].sum()),
    )


def _rate(found: Array) -> Sums:
    """New tokens over seconds of ``found`` [prompts, 3]."""
    return Sums(of=found[:, 0], per=found[:, 2])


def _jacobi(request: Request, decoder: JacobiDecoder) -> Job:
    def run(ids: list[int]) -> tuple[int, int]:
        _, output = next(request.decode(decoder, [ids]))
        return int(output.lengths.sum()), output.forwards  # reading the lengths waits for an accelerator

    return run


def _greedy(request: Request) -> Job:
    def run(ids: list[int]) -> tuple[int, int]:
        tokens = len(greedy_outputs(request, [ids])[0])
        return tokens, tokens - 1

    return run


def greedy_outputs(request: Request, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The model's own greedy tokens, one pass for each."""
    params = SamplingParams(max_tokens=request.max_new_tokens, temperature=0.0, stop_ids=request.stop_ids)
    found = generate(
        request.model,
        prompts,
        params,
        seeds=[0] * len(prompts),
        pad_token_id=request.pad_token_id,
        batch_size=request.batch_size,
    )
    return [one.ids for one in found]

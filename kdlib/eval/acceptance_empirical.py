"""What speculative decoding really accepts: counters of every verify round, per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from kdlib.decoding.speculative import SpeculativeOutput, speculative_generate
from kdlib.eval.acceptance_expected import DraftSampling
from kdlib.eval.acceptance_statistics import Array, Estimate, Sums, ratio
from kdlib.eval.speedup import acceptance_length_of, iid_acceptance_length
from kdlib.keys import draw_key
from kdlib.types import SamplingParams

_SPECULATION = 1  # keeps these draws apart from those of the responses


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How both models are run. ``params``: temperature, top_k, top_p, max_tokens and stop_ids of the request.

    ``tokenizer``: of both; needed where their vocabularies are padded to different sizes.
    """

    target: Any
    draft: Any
    tokenizer: PreTrainedTokenizerBase | None = None
    params: SamplingParams
    pad_token_id: int
    batch_size: int
    seed: int
    resamples: int


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Per prompt: ``rounds`` and ``drafted`` [prompts], ``accepted`` [prompts, gamma] (position i and all before it)."""

    rounds: Array
    drafted: Array
    accepted: Array

    @property
    def per_round(self) -> Sums:
        """Accepted draft tokens per verify round."""
        return Sums(of=self.accepted.sum(-1), per=self.rounds)

    @property
    def per_draft_token(self) -> Sums:
        return Sums(of=self.accepted.sum(-1), per=self.drafted)


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """Speculative decoding of all prompts with one gamma and one way of drafting, in vLLM's words.

    ``acceptance_length``: 1 + accepted / rounds, the bonus token included, the prefill's token not. ``acceptance_rate``:
    accepted / drafted. ``acceptance_rate_per_position``: share of rounds that kept position i and all before it;
    ``conditional_acceptance_rate_per_position``: of those that kept all before it. ``outputs``: the new tokens of each prompt.
    """

    num_speculative_tokens: int
    draft_sample_method: DraftSampling
    acceptance_length: Estimate
    acceptance_rate: Estimate
    acceptance_rate_per_position: list[float]
    conditional_acceptance_rate_per_position: list[float | None]
    iid_acceptance_length: float
    num_tokens: int
    counters: Counters = field(repr=False)
    outputs: list[list[int]] = field(repr=False)

    @property
    def acceptance_length_from_conditional_rates(self) -> float:
        """1 + sum_k prod_{i<=k} alpha_i; differs from ``acceptance_length`` by rounds that had fewer than gamma drafts."""
        return acceptance_length_of([rate or 0.0 for rate in self.conditional_acceptance_rate_per_position])

    def to_json(self) -> dict[str, Any]:
        estimates = ("acceptance_length", "acceptance_rate")
        plain = (
            "num_speculative_tokens",
            "draft_sample_method",
            "acceptance_rate_per_position",
            "conditional_acceptance_rate_per_position",
            "iid_acceptance_length",
            "num_tokens",
        )
        return {
            **{name: getattr(self, name) for name in plain},
            **{name: getattr(self, name).to_json() for name in estimates},
            "num_drafts": int(self.counters.rounds.sum()),
            "num_draft_tokens": int(self.counters.drafted.sum()),
            "num_accepted_tokens": int(self.counters.accepted.sum()),
        }


def speculate(
    decoding: Decoding, prompts: Sequence[list[int]], *, keys: Sequence[int], gamma: int, method: DraftSampling
) -> SpeculativeOutput:
    """One batch of ``speculative_generate``; a prompt's draws follow from its key, gamma and the seed."""
    longest = max(map(len, prompts))
    device = next(decoding.target.parameters()).device
    padded = [[decoding.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
    params = decoding.params
    return speculative_generate(
        decoding.target,
        decoding.draft,
        torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=params.max_tokens,
        gamma=gamma,
        temperature=params.temperature,
        top_k=params.top_k or None,
        top_p=params.top_p if params.top_p < 1 else None,
        seeds=[draw_key(decoding.seed, _SPECULATION, gamma, key) for key in keys],
        draft_sampling=method,
        stop_ids=params.stop_ids,
        pad_token_id=decoding.pad_token_id,
        tokenizer=decoding.tokenizer,
        draft_tokenizer=decoding.tokenizer,
    )


def new_tokens(output: SpeculativeOutput, *, prompt_length: int) -> list[list[int]]:
    """The new tokens of each row of a left-padded batch."""
    rows = zip(output.sequences[:, prompt_length:].tolist(), output.lengths.tolist(), strict=True)
    return [row[:length] for row, length in rows]


def empirical_acceptance(
    decoding: Decoding,
    prompts: Sequence[list[int]],
    *,
    keys: Sequence[int],
    gamma: int,
    method: DraftSampling,
    alpha: float,
) -> Decoded:
    """Decodes every prompt and counts; ``alpha``: the expected acceptance, for the i.i.d. prediction beside the count."""
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    rounds, drafted = np.zeros(len(prompts)), np.zeros(len(prompts))
    accepted = np.zeros((len(prompts), gamma))
    outputs: list[list[int]] = [[] for _ in prompts]
    with tqdm(total=len(prompts), desc=f"Speculative decoding, {gamma} {method} drafts", unit="prompt") as bar:
        for start in range(0, len(order), decoding.batch_size):
            rows = order[start : start + decoding.batch_size]
            batch = [prompts[row] for row in rows]
            output = speculate(decoding, batch, keys=[keys[row] for row in rows], gamma=gamma, method=method)
            rounds[rows], drafted[rows] = output.rounds.cpu().numpy(), output.drafted.cpu().numpy()
            accepted[rows] = output.accepted_per_position.cpu().numpy()
            for row, ids in zip(rows, new_tokens(output, prompt_length=max(map(len, batch))), strict=True):
                outputs[row] = ids
            bar.update(len(rows))
    counters = Counters(rounds=rounds, drafted=drafted, accepted=accepted)
    return _decoded(decoding, counters, outputs, gamma=gamma, method=method, alpha=alpha)


def _decoded(
    decoding: Decoding,
    counters: Counters,
    outputs: list[list[int]],
    *,
    gamma: int,
    method: DraftSampling,
    alpha: float,
) -> Decoded:
    total, rounds = counters.accepted.sum(0), counters.rounds.sum()
    kept_before = [rounds, *total[:-1]]
    chance = {"resamples": decoding.resamples, "seed": decoding.seed}
    return Decoded(
        num_speculative_tokens=gamma,
        draft_sample_method=method,
        acceptance_length=ratio(counters.per_round, plus=1.0, **chance),
        acceptance_rate=ratio(counters.per_draft_token, **chance),
        acceptance_rate_per_position=[float(kept / rounds) for kept in total],
        conditional_acceptance_rate_per_position=[
            float(kept / before) if before else None for kept, before in zip(total, kept_before, strict=True)
        ],
        iid_acceptance_length=iid_acceptance_length(alpha, gamma=gamma),
        num_tokens=sum(map(len, outputs)),
        counters=counters,
        outputs=outputs,
    )

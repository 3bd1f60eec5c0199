"""Expected acceptance: the probability that verification keeps a drafted token, exactly, at every position of given responses.

Leviathan et al. 2023: a token drafted from q is kept with probability sum_v min(p_v, q_v) = 1 - TV(p, q); a draft that
proposes argmax q is kept with probability p(argmax q).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from datasets import Dataset
from torch import Tensor

from kdlib.data.draft import UNSCORED
from kdlib.decoding.sampling import filtered_log_probs
from kdlib.eval.scoring import ScoredChunk
from kdlib.types import SamplingParams

DraftSampling = Literal["probabilistic", "greedy"]
METHODS: tuple[DraftSampling, ...] = ("probabilistic", "greedy")


@dataclass(frozen=True, kw_only=True)
class PositionValues:
    """N response positions: ``prompt`` [N] their prompt's number, ``position`` [N] from 0 in the response, ``accepted`` [N, 2].

    The columns of ``accepted`` are METHODS. ``dropped`` positions had no finite value and are left out.
    """

    prompt: Tensor
    position: Tensor
    accepted: Tensor
    dropped: int

    def of(self, method: DraftSampling) -> Tensor:
        return self.accepted[:, METHODS.index(method)]


def acceptance_probability(target: Tensor, draft: Tensor, *, params: SamplingParams, ids: Tensor | None = None) -> Tensor:
    """[n, 2]: sum_v min(p_v, q_v) and p(argmax q); at temperature 0 both are 1 where the argmaxes agree, else 0.

    ``target`` [n, V] and ``draft`` [n, DV] logits get the same temperature, top_k and top_p in float32. q is 0 outside the
    draft's entries and p is not renormalised on them. ``ids`` [DV]: the target's ids of the draft's entries; None: 0..DV-1.
    """
    best = draft.argmax(-1)
    proposed = best if ids is None else ids[best]
    if params.temperature == 0:
        agree = (target.argmax(-1) == proposed).float()
        finite = target.isfinite().any(-1) & draft.isfinite().any(-1) & ~target.isnan().any(-1) & ~draft.isnan().any(-1)
        return torch.where(finite, agree, torch.nan)[:, None].expand(-1, 2)
    p, q = filtered_log_probs(target, params), filtered_log_probs(draft, params)
    greedy = p.gather(-1, proposed[:, None])[:, 0].exp()
    shared = p[:, : q.shape[-1]] if ids is None else p[:, ids]
    overlap = torch.minimum(shared, q).exp().sum(-1).clamp(max=1.0)
    return torch.stack([overlap, greedy + 0.0 * overlap], -1)  # a row that is NaN for one is NaN for both


def expected_acceptance(chunks: Iterable[ScoredChunk], params: SamplingParams, *, ids: Tensor | None = None) -> PositionValues:
    """The acceptance probability of every scored position of ``chunks``, whose logits are (target's, draft's).

    The positions of a row must come in order, as ``kdlib.eval.scoring.scored_chunks`` gives them.
    """
    rows, values = [], []
    for chunk in chunks:
        rows.append(chunk.row)
        target, draft = chunk.logits
        values.append(acceptance_probability(target, draft, params=params, ids=ids).cpu())
    prompt, accepted = torch.cat(rows), torch.cat(values)
    order = prompt.argsort(stable=True)
    prompt, accepted = prompt[order], accepted[order]
    position = torch.arange(len(prompt)) - torch.searchsorted(prompt, prompt)  # since the row's first
    finite = accepted.isfinite().all(-1)
    return PositionValues(
        prompt=prompt[finite], position=position[finite], accepted=accepted[finite], dropped=int((~finite).sum())
    )


def response_rows(prompts: Sequence[list[int]], responses: Sequence[list[int]]) -> Dataset:
    """Token rows whose responses are scored and whose prompts are not."""
    pairs = list(zip(prompts, responses, strict=True))
    return Dataset.from_dict(
        {
            "input_ids": [prompt + response for prompt, response in pairs],
            "labels": [[UNSCORED] * len(prompt) + response for prompt, response in pairs],
        }
    )


def per_prompt(values: PositionValues, method: DraftSampling, *, prompts: int) -> tuple[Tensor, Tensor]:
    """(sum of acceptance [prompts], counted positions [prompts]) in float64."""
    total = torch.zeros(prompts, dtype=torch.float64).index_add_(0, values.prompt, values.of(method).double())
    return total, torch.bincount(values.prompt, minlength=prompts).double()


def along_response(values: PositionValues, method: DraftSampling, *, bins: int = 32) -> list[dict[str, Any]]:
    """Mean ``acceptance_rate`` in stretches of the response, from ``start`` to ``stop`` (exclusive), and their ``tokens``."""
    longest = int(values.position.max()) + 1
    width = -(-longest // bins)
    group = values.position // width
    counts = torch.bincount(group).double()
    total = torch.zeros_like(counts).index_add_(0, group, values.of(method).double())
    return [
        {"start": b * width, "stop": (b + 1) * width, "tokens": int(n), "acceptance_rate": float(s / n)}
        for b, (s, n) in enumerate(zip(total, counts, strict=True))
        if n > 0
    ]

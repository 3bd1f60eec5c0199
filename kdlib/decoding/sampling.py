"""Sampling from a causal language model: what tokens are drawn with, and completions of many prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.decoding.batch import Batch
from kdlib.types import Completion, SamplingParams

_BELOW_ONE = 1.0 - 2.0**-40


def filtered_log_probs(logits: Tensor, params: SamplingParams) -> Tensor:
    """Log-probabilities [..., V] that tokens are drawn with: softmax(z / T), cut to top_k, then top_p, normalised; float32.

    What is cut has -inf. top_p keeps the likeliest tokens until their mass reaches it, the one that crosses included. At
    temperature 0 nothing is cut and T is 1: the argmax is taken, and its log-prob is the model's own.
    """
    z = logits.float() if logits.dtype.itemsize < 4 else logits
    if params.temperature == 0:
        return z.log_softmax(-1)
    if params.temperature != 1:
        z = z / params.temperature
    if 0 < params.top_k < z.shape[-1]:
        z = z.masked_fill(z < z.topk(params.top_k).values[..., -1:], -torch.inf)
    if params.top_p < 1:
        z = _nucleus(z, params.top_p)
    return z.log_softmax(-1)


def _nucleus(z: Tensor, top_p: float) -> Tensor:
    ordered, order = z.sort(descending=True, stable=True)
    probs = ordered.softmax(-1)
    outside = probs.cumsum(-1) - probs >= top_p  # the mass before a token: 0 for the first, which therefore always stays
    return z.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


def draw(logp: Tensor, uniform: Tensor) -> Tensor:
    """Token ids [n] by inversion: the first whose cumulative probability exceeds ``uniform`` [n] in [0, 1); ``logp`` [n, V].

    An id of probability 0 is never drawn.
    """
    cumulative = logp.exp().cumsum(-1, dtype=torch.float64)
    # kept below the total, so that rounding cannot point past the last id that has mass
    target = uniform.double() * _BELOW_ONE * cumulative[:, -1]
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=logp.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    *,
    seeds: Sequence[int],
    pad_token_id: int,
    batch_size: int | None = None,
) -> list[Completion]:
    """One completion for each prompt, in order. Random numbers come from the row's own seed, whatever it is batched with.

    ``model``: a transformers (or peft) causal language model in evaluation mode. ``batch_size``: rows decoded at once, those of
    similar length together; None: all. Raises ValueError for an empty prompt and for one that leaves no room in the context.
    """
    if len(prompts) != len(seeds):
        raise ValueError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
    context = context_length(model)
    check_prompts(prompts, context=context)
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), prompts[row]))
    size = batch_size or max(len(order), 1)
    found: dict[int, Completion] = {}
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        limits = [int(min(params.max_tokens, context - len(prompts[row]))) for row in rows]
        batch = Batch(model, [prompts[row] for row in rows], limits=limits, pad_token_id=pad_token_id)
        found.update(zip(rows, _decode(batch, params, seeds=[seeds[row] for row in rows]), strict=True))
    return [found[row] for row in range(len(prompts))]


def context_length(model: Any) -> float:
    """The longest sequence the model was built for; infinite for models without positions."""
    # not every architecture has the entry: one without has no such limit
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return float("inf") if length is None else length


def check_prompts(prompts: Sequence[list[int]], *, context: float) -> None:
    """Raises ValueError, naming the prompt, for an empty one and for one that leaves no room for a token."""
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {index} is empty: give at least one token, for example the bos token")
        if len(prompt) >= context:
            raise ValueError(
                f"prompt {index} has {len(prompt)} tokens and fills the model's context of {context}: shorten or drop it"
            )


def _decode(batch: Batch, params: SamplingParams, *, seeds: Sequence[int]) -> list[Completion]:
    """Draws until every row has met a stop token or its limit."""
    device, steps = batch.device, int(batch.limits.max())
    stop = torch.tensor(params.stop_ids, dtype=torch.long, device=device)
    uniform = torch.stack([uniforms(seed, steps) for seed in seeds]).to(device)
    ids = torch.zeros(uniform.shape, dtype=torch.long, device=device)
    drawn = torch.zeros(uniform.shape, device=device)
    check_every = 1 if device.type == "cpu" else 8  # asking an accelerator stalls its queue
    done = torch.zeros(len(seeds), dtype=torch.bool, device=device)
    for step in range(steps):
        logp = filtered_log_probs(batch.logits, params)
        chosen = logp.argmax(-1) if params.temperature == 0 else draw(logp, uniform[batch.rows, step])
        ids[batch.rows, step] = chosen
        drawn[batch.rows, step] = logp.gather(-1, chosen[:, None])[:, 0].float()
        done |= torch.isin(chosen, stop) | (batch.limits[batch.rows] <= step + 1)
        if (step + 1) % check_every == 0:
            left = len(done) - int(done.sum())
            if left == 0:
                break
            if left * 2 <= len(done):
                kept = (~done).nonzero()[:, 0]
                batch.keep(kept)
                chosen, done = chosen[kept], done[kept]
        if step + 1 < steps:
            batch.step(chosen)
    return _completions(ids, drawn, limits=batch.limits.tolist(), stop_ids=params.stop_ids)


def uniforms(seed: int, steps: int) -> Tensor:
    """[steps] numbers in [0, 1) that depend on the seed alone; drawn on the CPU, so that they are the same on every device."""
    return torch.rand(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _completions(ids: Tensor, logp: Tensor, *, limits: list[int], stop_ids: tuple[int, ...]) -> list[Completion]:
    """Each row up to its first stop token or its limit."""
    found = []
    for row, values, limit in zip(ids.tolist(), logp.tolist(), limits, strict=True):
        ends = [position for position, token in enumerate(row[:limit]) if token in stop_ids]
        n = ends[0] + 1 if ends else limit
        found.append(Completion(ids=row[:n], logp=values[:n], finish="stop" if ends else "length"))
    return found

"""Decoding of masked diffusion language models: a response of MASK tokens, of which every pass commits some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from kdlib.decoding.diffusion_blocks import Blocks
from kdlib.decoding.diffusion_loop import Denoising, Ending
from kdlib.decoding.diffusion_reader import Cache, Reader
from kdlib.decoding.diffusion_step import Strategy
from kdlib.decoding.prompts import left_padding, row_seeds, stops_of
from kdlib.decoding.sampling import context_length
from kdlib.diffusion.convert import check_diffusion
from kdlib.diffusion.spec import DiffusionSpec


@dataclass(frozen=True, kw_only=True)
class DiffusionOutput:
    """Responses, and how many passes they took.

    ``sequences`` [B, S + G]: prompts and responses; ``forwards`` [B]: passes that a row took part in; ``guide_forwards`` [B]:
    those of a guide, beside them. ``commit_step`` [B, G]: the row's pass, from 1, that committed a token; 0 for what fills the
    response behind its end. ``lengths`` [B]: tokens before the first stop token.
    """

    sequences: Tensor
    forwards: Tensor
    commit_step: Tensor
    lengths: Tensor
    guide_forwards: Tensor

    @property
    def tokens_per_forward(self) -> float:
        """Tokens before the end per pass, over all rows: sum of ``lengths`` / sum of ``forwards``."""
        return int(self.lengths.sum()) / int(self.forwards.sum())


@torch.no_grad()
def diffusion_generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    spec: DiffusionSpec,
    gen_length: int,
    block_length: int,
    strategy: Strategy,
    temperature: float = 0.0,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
) -> DiffusionOutput:
    """Fills ``gen_length`` = G MASK tokens behind ``input_ids`` [B, S] (left-padded), block by block from the left.

    A pass gives softmax(z_c) for every column c of the live blocks; its proposal is argmax z_c, or drawn from softmax(z_c / T)
    at ``temperature`` T > 0; ``strategy`` says which proposals are committed, which is final (LLaDA, arXiv 2502.09992, section
    2.4). MASK has no probability. Blocks are ``block_length`` tokens, the last one perhaps fewer. Rows do not wait for each
    other, nor depend on each other: draws come from a row's own seed, of ``seeds`` or else from ``generator``.

    ``model`` is in evaluation mode. ``cache``: what is not read again in every pass (``Reader`` says what each one
    approximates). ``stop_ids``: None for the end of the spec, or else of the model's generation config; () for none. What is
    behind a committed stop token is filled with the spec's end token (else the first of ``stop_ids``), and the row ends when
    all before it is committed.

    Raises ValueError for a model or spec without masks, a causal model, options out of range or that do not go together, a
    prompt that holds MASK, is empty or leaves no room in the model's context, a mask that is not left-padded, and another
    number of seeds than of rows.
    """
    _check_options(spec, gen_length=gen_length, block_length=block_length, temperature=temperature, cache=cache)
    check_diffusion(model, spec)
    assert spec.mask_token_id is not None
    padding = left_padding(model, input_ids, attention_mask=attention_mask)
    check_canvas(model, input_ids, padding=padding, spec=spec, gen_length=gen_length)
    seeds = row_seeds(seeds, rows=len(input_ids), generator=generator) if temperature > 0 else ()
    start = input_ids.shape[1]
    blocks = Blocks.of(spec, block_length=block_length, start=start, gen_length=gen_length, padding=padding)
    reader = Reader(model, spec=spec, blocks=blocks, cache=cache)
    canvas = torch.full((len(input_ids), blocks.length), spec.mask_token_id, device=reader.device)
    canvas[:, :start] = input_ids
    ending = _ending(model, spec, stop_ids=stop_ids, device=reader.device)
    loop = Denoising(reader, canvas=canvas, strategy=strategy, ending=ending, temperature=temperature)
    loop.run(seeds)
    return DiffusionOutput(
        sequences=loop.canvas,
        forwards=loop.forwards.to(reader.device),
        commit_step=loop.commit_step,
        lengths=ending.first(loop.canvas[:, start:], masked=loop.masked)[:, 0],
        guide_forwards=loop.forwards.to(reader.device) * strategy.guide_passes,
    )


def _ending(model: nn.Module, spec: DiffusionSpec, *, stop_ids: Sequence[int] | None, device: torch.device) -> Ending:
    if stop_ids is None and spec.eos_token_id is not None:
        stop_ids = (spec.eos_token_id,)
    stops = stops_of(model, stop_ids)
    fill = spec.eos_token_id if spec.eos_token_id is not None else stops[0] if stops else 0
    return Ending(stop_ids=torch.tensor(stops, dtype=torch.long, device=device), fill=fill)


def _check_options(spec: DiffusionSpec, *, gen_length: int, block_length: int, temperature: float, cache: Cache | None) -> None:
    check_lengths(gen_length=gen_length, block_length=block_length, temperature=temperature, cache=cache)
    if spec.attention == "canvas":
        raise ValueError("a model with a canvas of random tokens is decoded by its own generate(), not by masks")
    if spec.attention == "block_causal" and block_length != spec.block_length:
        raise ValueError(
            f"the model's attention has blocks of {spec.block_length}: decode with that block_length, not {block_length}"
        )
    if cache == "block" and spec.attention != "block_causal":
        raise ValueError(
            f"cache block is for block-causal attention, the model's is {spec.attention}: choose prefix, dual or free"
        )


def check_lengths(*, gen_length: int, block_length: int, temperature: float, cache: str | None) -> None:
    """Raises ValueError for what no model can be decoded with."""
    if gen_length < 1 or block_length < 1:
        raise ValueError(f"gen_length {gen_length} and block_length {block_length}: choose at least 1 token each")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature}: choose 0 for the likeliest tokens, or more to draw them")
    if cache is not None and cache not in get_args(Cache):
        raise ValueError(f"cache {cache!r}: choose None, {', '.join(get_args(Cache))}")


def check_canvas(model: nn.Module, input_ids: Tensor, *, padding: Tensor, spec: DiffusionSpec, gen_length: int) -> None:
    """Raises ValueError for a prompt that holds MASK, or that leaves less than ``gen_length`` tokens of the context."""
    S = input_ids.shape[1]
    prompts = torch.arange(S) >= padding[:, None]
    holds = ((input_ids.cpu() == spec.mask_token_id) & prompts).any(-1)
    if holds.any():
        raise ValueError(f"prompt {int(holds.int().argmax())} holds the mask token {spec.mask_token_id}: take it out")
    context, longest = context_length(model), S - int(padding.min())
    if longest + gen_length > context:
        raise ValueError(
            f"a prompt of {longest} tokens and gen_length {gen_length} exceed the model's context of {context}: shorten one"
        )

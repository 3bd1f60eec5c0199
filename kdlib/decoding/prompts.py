"""What every decoding loop over a padded batch asks of its input: left padding, prompts that fit, seeds, stop and pad ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdlib.decoding.sampling import check_prompts, context_length
from kdlib.models import eos_ids, inner


def left_padding(model: Any, input_ids: Tensor, *, attention_mask: Tensor | None) -> Tensor:
    """Unused columns on the left of each row [B], on the CPU.

    Raises ValueError for a mask that is not left-padded, an empty prompt, and one that fills the model's context.
    """
    padding = _padding(input_ids, attention_mask)
    prompts = [row[start:] for row, start in zip(input_ids.tolist(), padding.tolist(), strict=True)]
    check_prompts(prompts, context=context_length(model))
    return padding


def _padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is None:
        return torch.zeros(len(input_ids), dtype=torch.long)
    mask = attention_mask.cpu().bool()
    if mask.shape != input_ids.shape or (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("attention_mask has the shape of input_ids and is left-padded: zeros before each prompt, none after")
    return (~mask).sum(-1)


def row_seeds(seeds: Sequence[int] | None, *, rows: int, generator: torch.Generator | None) -> Sequence[int]:
    """One seed for each row, drawn from ``generator`` (None: torch's own) when not given; ValueError for another number."""
    if seeds is None:
        device = "cpu" if generator is None else generator.device
        seeds = torch.randint(2**62, (rows,), generator=generator, device=device).tolist()
    if len(seeds) != rows:
        raise ValueError(f"{rows} prompts need as many seeds, not {len(seeds)}")
    return seeds


def stops_of(model: Any, stop_ids: Sequence[int] | None) -> tuple[int, ...]:
    """``stop_ids``, or the eos of the model's generation config when None."""
    return eos_ids(inner(model).generation_config.eos_token_id) if stop_ids is None else tuple(stop_ids)


def pad_id(model: Any, stop_ids: Sequence[int]) -> int:
    """What fills rows that end early: the model's padding token, or else a stop token, or else 0."""
    pad = model.generation_config.pad_token_id
    return pad if pad is not None else stop_ids[0] if stop_ids else 0

"""Tiny diffusion models in float64, and what each says of a response computed without kdlib's decoder."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from kdlib.diffusion import DiffusionSpec, as_diffusion
from tests.decoding.diffusion_oracle import Read
from tests.tiny import tiny_llama

V, MASK, EOS = 24, 23, 2
P = (7, 3, 5, 7, 1, 2, 4, 6)  # lengths of the prompts
SPECS = {
    "full": DiffusionSpec(mask_token_id=MASK, eos_token_id=EOS),
    "shifted": DiffusionSpec(mask_token_id=MASK, eos_token_id=EOS, shift=True),
    "blocks": DiffusionSpec(mask_token_id=MASK, eos_token_id=EOS, attention="block_causal", block_length=4),
    "sequence_blocks": DiffusionSpec(
        mask_token_id=MASK, eos_token_id=EOS, attention="block_causal", block_length=4, blocks_from="sequence", shift=True
    ),
}


def contextual(spec: DiffusionSpec, *, seed: int = 0, **config: Any) -> LlamaForCausalLM:
    """A random Llama that reads both ways."""
    model = tiny_llama(V, hidden=16, seed=seed, **{"initializer_range": 0.35, **config}).double()
    model.config.dtype = torch.float64
    model.lm_head.weight.data *= 4  # sure of some tokens
    return as_diffusion(model, spec)


def tabulated(spec: DiffusionSpec, *, seed: int = 0, positions: int = 40) -> tuple[LlamaForCausalLM, np.ndarray]:
    """A model whose logits depend on the position alone, and the table [positions, V]; MASK has the largest ones."""
    table = torch.randn(positions, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    table[:, MASK] = 9.0
    model = tiny_llama(V, hidden=positions + 4, num_attention_heads=2, num_key_value_heads=2).double()
    as_diffusion(model, spec)

    def look_up(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        at = kwargs.get("position_ids", torch.arange(kwargs["input_ids"].shape[1])[None]).expand_as(kwargs["input_ids"])
        read = output.last_hidden_state[..., -4:]  # what the layers say stays, though no logit depends on it
        output.last_hidden_state = torch.cat([torch.nn.functional.one_hot(at, positions).double(), read], dim=-1)
        return output

    model.model.register_forward_hook(look_up, with_kwargs=True)
    model.lm_head.weight.data = torch.cat([table.T, torch.zeros(V, 4, dtype=torch.float64)], dim=1)
    return model, table.numpy()


def prompts(seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, MASK, (length,), generator=generator).tolist() for length in P]


def batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = [[0] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def offset(spec: DiffusionSpec, prompt: list[int], *, n: int) -> int:
    return len(prompt) % n if spec.blocks_from == "sequence" else 0


def probabilities(logits: np.ndarray) -> np.ndarray:
    logits = logits.copy()
    logits[:, MASK] = -np.inf
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sees(spec: DiffusionSpec, *, prompt: int, length: int) -> torch.Tensor:
    """[length, length] whether a token sees another one, from the definition of the attention."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            if spec.attention == "full":
                allowed[i, j] = True
            elif spec.blocks_from == "sequence":
                allowed[i, j] = j // spec.block_length <= i // spec.block_length
            elif j < prompt:
                allowed[i, j] = True
            else:
                allowed[i, j] = i >= prompt and (j - prompt) // spec.block_length <= (i - prompt) // spec.block_length
    return allowed


def reader(model: LlamaForCausalLM, spec: DiffusionSpec, prompt: list[int], *, G: int) -> Read:
    """The whole canvas read anew in each pass, by the model's own forward."""
    allowed = sees(spec, prompt=len(prompt), length=len(prompt) + G)[None, None]

    @torch.no_grad()
    def read(tokens: list[int | None]) -> np.ndarray:
        ids = torch.tensor([prompt + [MASK if t is None else t for t in tokens]])
        logits = model(input_ids=ids, attention_mask=allowed, use_cache=False).logits[0].numpy()
        start = len(prompt) - (1 if spec.shift else 0)
        return probabilities(logits[start : start + G])

    return read

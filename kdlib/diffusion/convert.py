"""An auto-regressive model as a masked diffusion model: attention both ways, a mask token, the spec in its configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from kdlib.diffusion.spec import DiffusionSpec
from kdlib.models import evaluating, inner


def with_mask_token(tokenizer: PreTrainedTokenizerBase, mask_token: str | None) -> int:
    """The id of the tokenizer's mask token, which becomes ``mask_token`` where one is given (added if it is not there).

    Raises ValueError when there is none and none is given.
    """
    if mask_token is not None and mask_token != tokenizer.mask_token:
        tokenizer.add_special_tokens({"mask_token": mask_token})
    if tokenizer.mask_token_id is None:
        raise ValueError('the tokenizer has no mask token: add one with --mask_token "<|mask|>"')
    return int(tokenizer.mask_token_id)


def as_diffusion(model: nn.Module, spec: DiffusionSpec) -> nn.Module:
    """``model`` itself, reading both ways (config.is_causal False) and with ``spec`` in its configuration, both saved with it.

    Embeddings grow by a row of their mean where the mask token has none. Raises ValueError for a mask token far outside.
    """
    base = inner(model)
    rows = base.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    if spec.mask_token_id is not None and spec.mask_token_id >= rows:
        base.resize_token_embeddings(spec.mask_token_id + 1)  # type: ignore[operator]
    base.config.is_causal = False
    base.config.diffusion = spec.to_json()
    return model


@torch.no_grad()
def check_diffusion(model: nn.Module, spec: DiffusionSpec, *, role: str = "model") -> None:
    """Raises ValueError for a model that is no masked diffusion model: no row for its mask token, windows instead of attention
    to all tokens, or hidden states that do not depend on what comes later.
    """
    base: Any = inner(model)
    rows = base.get_input_embeddings().weight.shape[0]
    if spec.mask_token_id is None:
        raise ValueError(f"the {role} has no mask token (attention {spec.attention}): it is not trained or decoded by masks")
    if spec.mask_token_id >= rows:
        raise ValueError(f"mask_token_id {spec.mask_token_id} is outside of the {role}'s {rows} embeddings")
    text = base.config.get_text_config()
    if "sliding_attention" in set(getattr(text, "layer_types", None) or ()):
        raise ValueError(f"the {role} has layers of sliding-window attention, which do not see a whole response")
    device = next(base.parameters()).device
    if device.type == "meta":
        return
    ids = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 0]], device=device)
    with evaluating(base):
        first = base.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, 0]
    if torch.equal(first[0], first[1]):
        raise ValueError(
            f"the {role} ({type(base).__name__}) is causal, its tokens do not see later ones: "
            "kdlib diffusion trains it into a diffusion model first"
        )

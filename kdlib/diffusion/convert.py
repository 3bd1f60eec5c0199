"""An auto-regressive model as a masked diffusion model: attention both ways, a mask token, the spec in its configuration."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedTokenizerBase

from kdlib.diffusion.spec import DiffusionSpec
from kdlib.models import evaluating, fit_vocabulary, inner
from kdlib.streams import FULL, SLIDING

_MASKED_ATTENTION = ("sdpa", "eager", "flex_attention")
_FAR = 1024  # a tokenizer that outgrew its model has a few tokens more than it


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

    Embeddings and head grow by rows that are their mean where the mask token has none; what else the configuration's entry
    holds, such as decoding settings, stays. Raises ValueError for a mask token far outside, and where an adapter is in the way.
    """
    base: Any = inner(model)
    rows = base.get_input_embeddings().weight.shape[0]
    if spec.mask_token_id is not None and spec.mask_token_id >= rows:
        _check_growth(base, spec.mask_token_id, rows=rows)
        fit_vocabulary(base, spec.mask_token_id + 1, tokens=rows)
    base.config.is_causal = False
    base.config.diffusion = {
        **(getattr(base.config, "diffusion", None) or {}),
        **spec.to_json(),
    }  # absent before the first time
    return model


def _check_growth(base: Any, mask_token_id: int, *, rows: int) -> None:
    if mask_token_id > rows + _FAR:
        raise ValueError(f"mask_token_id {mask_token_id} is far outside of the model's {rows} embeddings: another tokenizer's?")
    if any(
        isinstance(x, BaseTunerLayer | ModulesToSaveWrapper)
        for x in (base.get_input_embeddings(), base.get_output_embeddings())
    ):
        raise ValueError(
            f"mask_token_id {mask_token_id} needs a new row of the embeddings, which an adapter holds: leave embed_tokens and "
            "lm_head out of its modules, or choose a token that the model has as --mask_token"
        )


@torch.no_grad()
def check_diffusion(model: nn.Module, spec: DiffusionSpec, *, role: str = "model") -> None:
    """Raises ValueError for a model that is no masked diffusion model: no row for its mask token, layers or an implementation
    of attention that do not let a token see what a mask says, or hidden states that do not depend on what comes later.
    """
    base: Any = inner(model)
    if spec.mask_token_id is None:
        raise ValueError(f"the {role} has no mask token (attention {spec.attention}): it is not trained or decoded by masks")
    rows = base.get_input_embeddings().weight.shape[0]
    if spec.mask_token_id >= rows:
        raise ValueError(f"mask_token_id {spec.mask_token_id} is outside of the {role}'s {rows} embeddings")
    _check_layers(base, role=role)
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


def _check_layers(base: Any, *, role: str) -> None:
    text, what = base.config.get_text_config(), f"the {role} ({type(base).__name__})"
    kinds = set(getattr(text, "layer_types", None) or ())  # not every configuration has the entry
    if not base.can_generate():
        raise ValueError(f"{what} is an encoder: kdlib's diffusion models are decoder-only models, ...ForCausalLM")
    if base._is_stateful or kinds - {FULL, SLIDING}:
        raise ValueError(f"{what} has recurrent or linear layers, which read from left to right whatever the mask")
    if SLIDING in kinds or (not kinds and getattr(text, "sliding_window", None) is not None):
        raise ValueError(f"{what} has layers of sliding-window attention, which do not see a whole response")
    if text._attn_implementation not in _MASKED_ATTENTION:
        raise ValueError(f"{what} runs {text._attn_implementation}, which takes no masks: give attn_implementation sdpa")

"""Target and draft as they are measured together: loaded, compared, and with the request that both serve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from kdlib.decoding.drafters import Drafter
from kdlib.decoding.eagle_drafter import EagleDrafter
from kdlib.decoding.prompts import pad_id
from kdlib.decoding.sampling import context_length
from kdlib.drafts import formats
from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.eval.acceptance_empirical import Decoding
from kdlib.models import eos_ids, load_model, load_tokenizer
from kdlib.tokenizers.identity import explain_difference, same_tokenizer
from kdlib.types import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Model = nn.Module | Drafter | str


def decoding_of(
    target: nn.Module | str,
    draft: Model,
    params: SamplingParams,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    stop_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    resamples: int = 2000,
) -> Decoding:
    """The pair on one device. Paths are loaded, and so is the tokenizer of a target that is one.

    Raises ValueError for tokenizers that differ and for a draft whose vocabulary is larger than the target's.
    """
    if tokenizer is None and isinstance(target, str):
        tokenizer = load_tokenizer(target)
    if tokenizer is not None and isinstance(draft, str):
        check_tokenizers(tokenizer, draft)
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    base: Any = load_model(target).to(on) if isinstance(target, str) else target
    device = next(base.parameters()).device
    small = _draft(draft, base, device)
    _check_vocabularies(base, small, tokenizer)
    stops = eos_ids(base.generation_config.eos_token_id) if stop_ids is None else tuple(stop_ids)
    return Decoding(
        target=base,
        draft=small,
        tokenizer=tokenizer,
        params=replace(params, stop_ids=stops),
        pad_token_id=pad_id(base, stops),
        batch_size=batch_size,
        seed=seed,
        resamples=resamples,
    )


def _draft(draft: Model, target: Any, device: torch.device) -> Any:
    """A path as a model or an EAGLE-3 head; a head as the drafter it is used by."""
    if isinstance(draft, str):
        draft = (formats.load(draft, target).eval() if formats.is_head(draft) else load_model(draft)).to(device)
    return EagleDrafter(draft) if isinstance(draft, Eagle3Draft) else draft


def check_tokenizers(tokenizer: PreTrainedTokenizerBase, draft: str) -> None:
    """ValueError when the draft's tokenizer is another one; a draft without a tokenizer reads the target's tokens."""
    try:
        theirs = load_tokenizer(draft)
    except ValueError:
        return
    if not same_tokenizer(tokenizer, theirs):
        raise ValueError(
            f"target and draft have different tokenizers ({explain_difference(tokenizer, theirs)}): acceptance compares "
            "probabilities of the same tokens, train a draft that has the target's tokenizer"
        )


def longest_prompt(decoding: Decoding) -> float:
    """The most tokens a prompt may have so that max_tokens fit into both contexts."""
    draft = decoding.draft
    limits = [context_length(decoding.target), draft.context if isinstance(draft, Drafter) else context_length(draft)]
    longest = min(limits) - decoding.params.max_tokens
    if longest < 1:
        raise ValueError(
            f"max_new_tokens {decoding.params.max_tokens} leaves no room for a prompt in a context of {min(limits)}: lower it"
        )
    return longest


def name_of(model: Any) -> str:
    """The path or Hub id of a model, or its class where it has none."""
    if isinstance(model, str):
        return model
    return (isinstance(model, PreTrainedModel) and model.name_or_path) or type(model).__name__


def _check_vocabularies(target: Any, draft: Any, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if isinstance(draft, Drafter):
        return
    ours, theirs = (model.config.get_text_config().vocab_size for model in (target, draft))
    if theirs > ours:
        raise ValueError(
            f"the draft has {theirs} tokens and the target {ours}: the target cannot keep what it does not know, give a draft "
            "with the target's vocabulary (`vocab_size` in config.json)"
        )
    if theirs < ours and tokenizer is None:
        raise ValueError(f"the draft has {theirs} tokens and the target {ours}: add the tokenizer= that both share")

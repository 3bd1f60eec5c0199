"""Speculative decoding: a draft proposes gamma tokens a round, the target reads them in one pass and keeps what stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kdlib.decoding.cache import check_cache
from kdlib.decoding.drafters import Drafter, ModelDrafter
from kdlib.decoding.prompts import left_padding, pad_id, row_seeds, stops_of
from kdlib.decoding.spec_loop import Speculation, SpeculativeOutput
from kdlib.decoding.spec_vocabulary import SharedVocabulary
from kdlib.tokenizers import same_tokenizer
from kdlib.types import SamplingParams

__all__ = ["SpeculativeOutput", "speculative_generate"]


@torch.no_grad()
def speculative_generate(
    target: nn.Module,
    draft: nn.Module | Drafter,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    gamma: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    draft_sampling: Literal["probabilistic", "greedy"] = "probabilistic",
    lenience: float = 1.0,
    stop_ids: Sequence[int] | None = None,
    pad_token_id: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    draft_tokenizer: PreTrainedTokenizerBase | None = None,
) -> SpeculativeOutput:
    """Continues ``input_ids`` [B, S] (left-padded) as the target alone would, in fewer passes (Leviathan et al. 2023).

    A proposal x ~ q is accepted with min(1, p(x) / q(x)); the first one that is not is replaced by a draw from
    norm(max(p - q, 0)), and after gamma accepted ones a token of p follows. p and q are both what temperature, top_k and top_p
    leave (``filtered_log_probs``), so the result is distributed as plain sampling is; at temperature 0 it is its argmax. In
    float32 the tokens are the target's own; in 16 bits passes of different length round differently.
    ``draft_sampling="greedy"``: at temperature > 0 the draft proposes its argmax, accepted with p(argmax q) (vLLM's default);
    exact too. ``lenience`` l > 1 accepts with min(1, l p/q): faster and lossy, no token gets more than l times its probability.

    ``target`` and ``draft`` (a causal language model or a ``Drafter``) are in evaluation mode. ``seeds``: one for each row,
    drawn from ``generator`` when None; a row's tokens depend on its own seed, not on its batch. ``stop_ids``: None for the eos
    of the target's generation config. With ``tokenizer`` and ``draft_tokenizer`` the draft may have another vocabulary: it
    proposes the tokens that both have. Towards the end of the draft's context fewer proposals are used, beyond it none; a
    row ends at the target's context.

    Raises ValueError for gamma, max_new_tokens or lenience below 1, filters out of range, an empty prompt, one that fills the
    target's context, a mask that is not left-padded, vocabularies that differ without tokenizers given or share next to
    nothing, and models whose state cannot go back.
    """
    if gamma < 1 or lenience < 1:
        raise ValueError(f"gamma {gamma} and lenience {lenience}: both are at least 1")
    if draft_sampling not in ("probabilistic", "greedy"):
        raise ValueError(f"draft_sampling {draft_sampling!r}: it is 'probabilistic' or 'greedy'")
    params = SamplingParams(
        max_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k or 0,
        top_p=1.0 if top_p is None else top_p,
        stop_ids=stops_of(target, stop_ids),
    )
    check_cache(target, role="target")
    drafter = draft if isinstance(draft, Drafter) else _model_drafter(target, draft, tokenizer, draft_tokenizer)
    padding = left_padding(target, input_ids, attention_mask=attention_mask)
    seeds = row_seeds(seeds, rows=len(input_ids), generator=generator)
    one_hot = draft_sampling == "greedy"
    speculation = Speculation(target, drafter, params=params, gamma=gamma, one_hot=one_hot, lenience=lenience, seeds=seeds)
    pad = pad_id(target, params.stop_ids) if pad_token_id is None else pad_token_id
    return speculation.run(input_ids.to(speculation.device), padding=padding, pad_token_id=pad)


def _model_drafter(
    target: Any, draft: Any, tokenizer: PreTrainedTokenizerBase | None, draft_tokenizer: PreTrainedTokenizerBase | None
) -> ModelDrafter:
    """The draft with the vocabulary it shares with the target; ValueError when the two differ and it is not known how."""
    sizes = tuple(model.config.get_text_config().vocab_size for model in (target, draft))
    if tokenizer is None or draft_tokenizer is None:
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"the target has {sizes[0]} tokens and the draft {sizes[1]}: give tokenizer and draft_tokenizer, "
                "and the draft proposes the tokens that both have"
            )
        return ModelDrafter(draft)
    if sizes[0] == sizes[1] and same_tokenizer(tokenizer, draft_tokenizer):
        return ModelDrafter(draft)
    shared = SharedVocabulary(tokenizer, draft_tokenizer, sizes=(sizes[0], sizes[1]))
    return ModelDrafter(draft, vocabulary=shared.to(next(draft.parameters()).device))

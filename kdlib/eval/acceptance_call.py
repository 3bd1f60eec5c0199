"""How much of a draft's work a target keeps: expected and counted acceptance, speed, and whether the output is the target's.

The protocol, and what each number counts, is in docs/acceptance.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdlib.decoding.drafters import Drafter
from kdlib.decoding.eagle_drafter import EagleDrafter
from kdlib.eval.acceptance_empirical import Decoding
from kdlib.eval.acceptance_expected import METHODS, DraftSampling
from kdlib.eval.acceptance_head import head_chunks
from kdlib.eval.acceptance_measurement import AcceptanceResult, Measurement, Scorer
from kdlib.eval.acceptance_pair import Model, decoding_of, longest_prompt, name_of
from kdlib.eval.acceptance_prompts import Asked, PromptSet, prompt_set
from kdlib.eval.scoring import scored_chunks
from kdlib.models import evaluating
from kdlib.types import Head, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["AcceptanceResult", "acceptance"]


def acceptance(
    target: nn.Module | str,
    draft: Model,
    prompts: Asked | PromptSet,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    gamma: int | Sequence[int] = 4,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 128,
    stop_ids: Sequence[int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    draft_sampling: Sequence[DraftSampling] = METHODS,
    checks: bool = True,
    timing: bool = True,
    timing_prompts: int = 8,
    resamples: int = 2000,
    apply_chat_template: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    responses: Sequence[list[int]] | None = None,
    scorer: Scorer | None = None,
) -> AcceptanceResult:
    """Measures how often ``target`` keeps what ``draft`` proposes on ``prompts``, and what that is worth.

    ``target``, ``draft``: loaded models, paths or Hub ids; a draft may also be an EAGLE-3 head, or a ``Drafter`` with a
    ``scorer`` that gives the logits of both at the scored positions of token rows. ``prompts``: token ids, texts, or rows as
    ``kdlib generate`` reads them (texts need the ``tokenizer``, which is loaded where ``target`` is a path).
    ``draft_sampling``: ways of drafting to decode with, () for none; of both the expected acceptance is reported. At
    temperature 0 there is one, greedy. ``stop_ids``: None for the eos of the target's generation config. ``batch_size``: rows
    decoded or scored at once; timing has one. ``timing_prompts``: how many prompts are timed. ``resamples``: of the bootstrap
    over prompts. ``responses``: the target's, of an earlier result with the same settings.

    Raises ValueError for gamma < 1, no usable prompts, token ids without room for max_new_tokens in either context, tokenizers
    that differ, and a draft whose vocabulary is larger than the target's.
    """
    gammas = _gammas(gamma)
    if unknown := set(draft_sampling) - set(METHODS):
        raise ValueError(f"draft_sampling {', '.join(map(repr, sorted(unknown)))}: choose of {', '.join(METHODS)}")
    k, p = top_k or 0, 1.0 if top_p is None else top_p
    params = SamplingParams(max_tokens=max_new_tokens, temperature=temperature, top_k=k, top_p=p)
    decoding = decoding_of(
        target,
        draft,
        params,
        tokenizer=tokenizer,
        stop_ids=stop_ids,
        batch_size=batch_size,
        seed=seed,
        resamples=resamples,
    )
    if not isinstance(prompts, PromptSet):
        prompts = prompt_set(
            prompts,
            tokenizer=decoding.tokenizer,
            longest=longest_prompt(decoding),
            apply_chat_template=apply_chat_template,
            chat_template_kwargs=chat_template_kwargs,
        )
    names = {"target": name_of(target), "draft": name_of(draft)}
    request = {"temperature": temperature, "top_k": k, "top_p": p, "max_new_tokens": max_new_tokens}
    measurement = Measurement(decoding=decoding, prompts=prompts, scorer=scorer or _model_scorer(decoding))
    models = [model for model in (decoding.target, decoding.draft) if isinstance(model, nn.Module)]
    with torch.no_grad(), evaluating(*models):
        return measurement.run(
            names | request | {"seed": seed},
            gammas=gammas,
            draft_sampling=draft_sampling,
            checks=checks,
            timed=timing_prompts if timing else 0,
            responses=responses,
        )


def _model_scorer(decoding: Decoding) -> Scorer:
    """Logits of two causal language models, or of one and its EAGLE-3 head; ValueError for a draft that is neither."""
    draft, size, desc = decoding.draft, decoding.batch_size, "Expected acceptance"
    if isinstance(draft, EagleDrafter):
        return lambda rows: head_chunks(decoding.target, draft, rows, batch_size=size, desc=desc)
    if isinstance(draft, Drafter):
        raise ValueError(f"{type(draft).__name__} is no causal language model: give its logits with scorer=")
    vocab_size, models = Head.of(decoding.target).out_features, [decoding.target, draft]
    return lambda rows: scored_chunks(models, rows, vocab_size=vocab_size, batch_size=size, desc=desc)


def _gammas(gamma: int | Sequence[int]) -> list[int]:
    gammas = [gamma] if isinstance(gamma, int) else list(dict.fromkeys(gamma))
    if not gammas or min(gammas) < 1:
        raise ValueError(f"num_speculative_tokens (gamma) must be at least 1, not {gamma}")
    return gammas

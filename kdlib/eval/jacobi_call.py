"""How many tokens a model gives per forward pass when blocks of them are decoded in parallel, and what that is worth.

What each number counts is in ``kdlib.eval.jacobi_counted`` and in the JSON.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kdlib.decoding.jacobi_init import Init
from kdlib.decoding.prompts import pad_id, stops_of
from kdlib.decoding.sampling import context_length
from kdlib.eval.acceptance_pair import name_of
from kdlib.eval.acceptance_prompts import Asked, PromptSet, prompt_set
from kdlib.eval.jacobi_decoder import JacobiDecoder, Request
from kdlib.eval.jacobi_measurement import JacobiMeasurement, JacobiResult
from kdlib.models import evaluating, load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["JacobiResult", "jacobi"]


def jacobi(
    model: nn.Module | str,
    prompts: Asked | PromptSet,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    block_size: int = 16,
    max_new_tokens: int = 128,
    init: Init = "prompt",
    max_iterations: int | None = None,
    sliding_window: bool = False,
    blocks: int = 1,
    spawn_ratio: float = 0.85,
    pool: int = 0,
    batch_size: int = 8,
    stop_ids: Sequence[int] | None = None,
    seed: int = 0,
    timing: bool = True,
    timing_prompts: int = 8,
    checks: bool = True,
    resamples: int = 2000,
    apply_chat_template: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> JacobiResult:
    """Decodes ``prompts`` with ``kdlib.decoding.jacobi_generate`` and counts tokens and passes.

    ``model``: a loaded model, a path or a Hub id. ``prompts``: token ids, texts, or rows as ``kdlib generate`` reads them
    (texts need the ``tokenizer``, which is loaded where ``model`` is a path), or those of an earlier result. ``block_size`` to
    ``pool``: the decoder's. ``batch_size``: rows decoded at once; timing has one. ``stop_ids``: None for the eos of the
    generation config. ``checks``: compare with the model's own greedy tokens. ``timing_prompts``: how many prompts are timed,
    by Jacobi decoding and by plain greedy decoding in turns. ``resamples``: of the bootstrap over prompts; its draws and those
    of ``init="random"`` follow from ``seed``.

    Raises ValueError for no usable prompts, prompts or options without room for max_new_tokens in the context, responses that
    all end with their first token, and what ``jacobi_generate`` refuses.
    """
    decoder = JacobiDecoder(
        block_size=block_size,
        init=init,
        max_iterations=max_iterations,
        sliding_window=sliding_window,
        blocks=blocks,
        spawn_ratio=spawn_ratio,
        pool=pool,
        seed=seed,
    )
    decoder.check(max_new_tokens=max_new_tokens)
    if tokenizer is None and isinstance(model, str):
        tokenizer = load_tokenizer(model)
    request = _request(model, max_new_tokens=max_new_tokens, stop_ids=stop_ids, batch_size=batch_size)
    if not isinstance(prompts, PromptSet):
        prompts = prompt_set(
            prompts,
            tokenizer=tokenizer,
            longest=_longest(request),
            apply_chat_template=apply_chat_template,
            chat_template_kwargs=chat_template_kwargs,
        )
    settings = {"model": name_of(model), "max_new_tokens": max_new_tokens, **decoder.to_json()}
    measurement = JacobiMeasurement(request=request, decoder=decoder, prompts=prompts, resamples=resamples)
    with torch.no_grad(), evaluating(request.model):
        return measurement.run(settings, checks=checks, timed=timing_prompts if timing else 0)


def _request(model: Any, *, max_new_tokens: int, stop_ids: Sequence[int] | None, batch_size: int) -> Request:
    """A path is loaded, onto the accelerator where there is one."""
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded: Any = load_model(model).to(on) if isinstance(model, str) else model
    stops = stops_of(loaded, stop_ids)
    return Request(
        model=loaded,
        max_new_tokens=max_new_tokens,
        stop_ids=stops,
        pad_token_id=pad_id(loaded, stops),
        batch_size=batch_size,
    )


def _longest(request: Request) -> float:
    """The most tokens a prompt may have so that max_new_tokens fit into the context."""
    context = context_length(request.model)
    longest = context - request.max_new_tokens
    if longest < 1:
        raise ValueError(
            f"max_new_tokens {request.max_new_tokens} leaves no room for a prompt in a context of {context}: lower it"
        )
    return longest

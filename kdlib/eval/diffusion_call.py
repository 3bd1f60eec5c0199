"""Accuracy against forward passes of a diffusion language model, over strategies of decoding.

What each number counts is in ``kdlib.eval.diffusion_counted`` and in the JSON.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from kdlib.decoding.diffusion_decoder import PRESETS, DiffusionDecoder
from kdlib.decoding.strategies import strategy_json
from kdlib.eval.acceptance_pair import name_of
from kdlib.eval.acceptance_prompts import Asked as Prompts
from kdlib.eval.acceptance_prompts import PromptSet, prompt_set
from kdlib.eval.diffusion_bits import DiffusionBound, diffusion_bound
from kdlib.eval.diffusion_config import config_of, decoder_with
from kdlib.eval.diffusion_point import Points, weights_of
from kdlib.eval.diffusion_result import ONE_BY_ONE, DiffusionSweep
from kdlib.eval.diffusion_sweep import Asked, Strategies, expanded, measure
from kdlib.eval.harness import require_lm_eval
from kdlib.eval.tasks import find_tasks
from kdlib.keys import draw_key
from kdlib.models import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Model = nn.Module | str


def diffusion(
    model: Model,
    *,
    base: Model | None = None,
    tasks: str | Sequence[str] = (),
    prompts: Prompts | PromptSet | None = None,
    rows: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    strategies: Strategies | None = None,
    preset: str | None = None,
    gen_length: int | None = None,
    block_length: int | None = None,
    cache: str | None = None,
    temperature: float | None = None,
    seed: int = 0,
    batch_size: int = 8,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool | None = None,
    include_path: str | os.PathLike[str] | None = None,
    metric: str | None = None,
    mc_samples: int = 32,
    max_length: int | None = None,
    output_path: str | os.PathLike[str] | None = None,
    resamples: int = 2000,
    load: Callable[[str], Any] = load_model,
) -> DiffusionSweep:
    """Decodes ``tasks`` and ``prompts`` with every strategy, by ``model`` and by ``base``, the model before training.

    ``strategies``: ``Name`` or ``{Name: {field: value}}``, where a list of values stands for one strategy each; None for the
    model's own and one token per step. ``preset`` (of ``diffusion_decoder.PRESETS``) and the options after it take the place of
    the model's own decoding settings, for both models and whatever a task says of its length. ``limit``: problems of a task.
    ``rows``: a bound on their bits per byte, by ``mc_samples`` masks each. ``output_path``: a directory that keeps each point,
    so that the same call continues. ``metric``: which of a task's scores is the accuracy. ``load``: how a path is loaded; a
    model is when something of it is missing. Intervals over answers are by bootstrap, ``resamples`` times.

    Raises ValueError for models that are no masked diffusion models, nothing to measure, unknown tasks, strategies and presets,
    and a directory with points of other settings.
    """
    tasks = [tasks] if isinstance(tasks, str) else list(tasks)
    if not tasks and prompts is None and rows is None:
        raise ValueError("nothing to measure: give tasks, prompts or rows")
    given = {"gen_length": gen_length, "block_length": block_length, "cache": cache, "temperature": temperature}
    decoder = _decoder(model, preset, {**{name: value for name, value in given.items() if value is not None}, "seed": seed})
    models = {"model": model} if base is None else {"base": base, "model": model}
    tokenizer = _tokenizer(model, tokenizer)
    manager, tasks = _found(tasks, include_path)
    template = {"apply_chat_template": apply_chat_template}
    scoring = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": bool(apply_chat_template)}
    asked = Asked(
        decoder=decoder,
        strategies=expanded(_default(decoder) if strategies is None else strategies),
        tasks=tasks,
        manager=manager,
        scoring=scoring,
        prompts=None if prompts is None else _prompts(prompts, models, decoder=decoder, tokenizer=tokenizer, **template),
        batch_size=batch_size,
    )
    kept = Points(None if output_path is None else Path(output_path), _settings(asked, models))
    bounds: dict[str, DiffusionBound] = {}
    for name, one in models.items():
        if rows is None and not asked.missing(name, kept):
            continue
        loaded = load(one) if isinstance(one, str) else one
        measure(loaded, name, asked, tokenizer=tokenizer, kept=kept)
        if rows is not None:
            options = {"tokenizer": tokenizer, "mc_samples": mc_samples, "max_length": max_length, "seed": seed}
            bounds[name] = diffusion_bound(loaded, rows, batch_size=batch_size, **options)
    points = [kept[name, strategy, task] for name in models for strategy, task in asked.everything]
    return DiffusionSweep(settings=kept.settings, points=points, bounds=bounds, metric=metric, resamples=resamples)


def _prompts(
    prompts: Any, models: Mapping[str, Model], *, decoder: DiffusionDecoder, tokenizer: Any, apply_chat_template: bool | None
) -> PromptSet:
    """Those that leave room for a response in every model's context."""
    if isinstance(prompts, PromptSet):
        return prompts
    contexts = [config_of(model).get_text_config().max_position_embeddings for model in models.values()]
    longest = min(contexts) - decoder.gen_length
    if longest < 1:
        raise ValueError(
            f"gen_length {decoder.gen_length} leaves no room for a prompt in a context of {min(contexts)}: lower it"
        )
    return prompt_set(prompts, tokenizer=tokenizer, longest=longest, apply_chat_template=apply_chat_template)


def _decoder(model: Model, preset: str | None, options: Mapping[str, Any]) -> DiffusionDecoder:
    """ValueError for a model that is no diffusion model, an unknown preset, and options out of range."""
    own = decoder_with(config_of(model), {})
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"no preset {preset}: choose {', '.join(PRESETS)}")
    return DiffusionDecoder.from_json({**(own if preset is None else PRESETS[preset]).to_json(), **options})


def _default(decoder: DiffusionDecoder) -> Strategies:
    return [strategy_json(decoder.strategy), {ONE_BY_ONE: {"steps": decoder.gen_length}}]


def _tokenizer(model: Model, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    if tokenizer is None and not isinstance(model, str):
        raise ValueError("a model object is measured with its tokenizer: give tokenizer=...")
    return load_tokenizer(str(model)) if tokenizer is None else tokenizer


def _found(tasks: list[str], include_path: Any) -> tuple[Any, list[str]]:
    if not tasks:
        return None, []
    require_lm_eval()
    return find_tasks(tasks, include_path=include_path)


def _settings(asked: Asked, models: Mapping[str, Model]) -> dict[str, Any]:
    """What a point depends on, beside its model's name, strategy and task."""
    decoder = {name: value for name, value in asked.decoder.to_json().items() if name != "strategy"}
    prompts = {} if asked.prompts is None else {"prompts": len(asked.prompts), "prompts_key": draw_key(*asked.prompts.keys)}
    named = {name: name_of(model) for name, model in models.items()}
    weights = {f"{name}_weights": weights_of(path) for name, path in named.items()}
    return {**named, **weights, **decoder, **asked.scoring, **prompts, "batch_size": asked.batch_size}

"""Every way of decoding a model, on every task: measured once, and kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from kdlib.decoding.diffusion_decoder import DiffusionDecoder
from kdlib.decoding.strategies import strategy_json, strategy_of
from kdlib.diffusion import check_diffusion, spec_of
from kdlib.eval.diffusion_counts import Counts
from kdlib.eval.diffusion_point import PROMPTS, Point, Points
from kdlib.eval.harness import borrowed, score
from kdlib.eval.machine import machine_of
from kdlib.eval.modes import own_randomness
from kdlib.eval.results import summary_rows
from kdlib.models import evaluating, inner

if TYPE_CHECKING:
    from kdlib.eval.acceptance_prompts import PromptSet

Strategies = Sequence[str | Mapping[str, Any]]


def expanded(strategies: Strategies) -> list[dict[str, Any]]:
    """``{Name: {field: [a, b]}}`` as ``{Name: {field: a}}`` and ``{Name: {field: b}}``, several lists as all combinations.

    Each is checked and complete, none comes twice. Raises ValueError for what ``strategy_of`` refuses.
    """
    found: list[dict[str, Any]] = []
    for strategy in strategies:
        for one in _combinations(strategy):
            complete = strategy_json(strategy_of(one))
            found += [] if complete in found else [complete]
    return found


def _combinations(strategy: str | Mapping[str, Any]) -> Iterator[str | Mapping[str, Any]]:
    if isinstance(strategy, str) or len(strategy) != 1 or not isinstance(next(iter(strategy.values())), Mapping):
        yield strategy
        return
    ((name, options),) = strategy.items()
    values = [value if isinstance(value, list | tuple) else [value] for value in options.values()]
    for chosen in product(*values):
        yield {name: dict(zip(options, chosen, strict=True))}


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What every model is asked: lm-eval tasks that ``find_tasks`` has found, with options of ``kdlib.eval.harness.score``, and
    prompts.
    """

    decoder: DiffusionDecoder
    strategies: list[dict[str, Any]]
    tasks: Sequence[str]
    manager: Any
    scoring: Mapping[str, Any]
    prompts: PromptSet | None
    batch_size: int

    @property
    def everything(self) -> Iterator[tuple[dict[str, Any], str]]:
        """(strategy, task)"""
        named = [*self.tasks, *([] if self.prompts is None else [PROMPTS])]
        return ((strategy, task) for strategy in self.strategies for task in named)

    def missing(self, model: str, kept: Points) -> list[tuple[dict[str, Any], str]]:
        return [(strategy, task) for strategy, task in self.everything if (model, strategy, task) not in kept]


def measure(model: nn.Module, name: str, asked: Asked, *, tokenizer: Any, kept: Points) -> None:
    """What ``kept`` does not have yet of one model, each point kept as soon as it is known.

    Raises ValueError for a model that is no masked diffusion model, and for a task without generated answers.
    """
    check_diffusion(model, spec_of(inner(model).config))
    with evaluating(model):
        lm = borrowed(model, tokenizer, batch_size=asked.batch_size) if asked.tasks else None
        for strategy, task in tqdm(asked.missing(name, kept), desc=name, unit="point"):
            decoder = replace(asked.decoder, strategy=strategy_of(strategy))
            counts, scores = _prompts(model, decoder, asked) if task == PROMPTS else _task(lm, decoder, task, asked=asked)
            point = Point(
                model=name,
                strategy=strategy,
                task=task,
                scores=scores,
                tokens=counts.tokens,
                forwards=counts.forwards,
                guide_forwards=counts.guide_forwards,
                seconds=counts.seconds,
                machine=machine_of(model),
            )
            kept.save(point)


def _task(lm: Any, decoder: DiffusionDecoder, task: str, *, asked: Asked) -> tuple[Counts, list[dict[str, Any]]]:
    """gen_length and a temperature above 0 are the decoder's, not the task's: all tasks are decoded alike."""
    lm.decoder, lm.counted = decoder, Counts()
    sampled = {"do_sample": True, "temperature": decoder.temperature} if decoder.temperature > 0 else {}
    generation = {"max_gen_toks": decoder.gen_length, **sampled}
    with own_randomness():
        results = score(
            lm,
            [task],
            manager=asked.manager,
            gen_kwargs=generation,
            batch_size=asked.batch_size,
            seed=decoder.seed,
            **asked.scoring,
        )
    if not lm.counted.tokens:
        raise ValueError(f"task {task} lets the model generate nothing: choose one whose output_type is generate_until")
    return lm.counted, summary_rows(results)


def _prompts(model: nn.Module, decoder: DiffusionDecoder, asked: Asked) -> tuple[Counts, list[dict[str, Any]]]:
    assert asked.prompts is not None
    counts, ids, spec = Counts(), asked.prompts.ids, spec_of(inner(model).config)
    start = time.perf_counter()
    for _, output in decoder.decode(model, ids, spec=spec, batch_size=asked.batch_size):
        counts.add(output)
        now = time.perf_counter()
        counts.took(now - start, expected=len(ids))
        start = now
    return counts, []

"""Strategies of decoding a diffusion language model: which proposals a pass commits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from kdlib.decoding.diffusion_step import Strategy
from kdlib.decoding.strategies.coherent import CoherentContext
from kdlib.decoding.strategies.guided import Guided
from kdlib.decoding.strategies.multi_block import MultiBlock
from kdlib.decoding.strategies.quota import LowConfidence, TopKMargin
from kdlib.decoding.strategies.slow_fast import SlowFast
from kdlib.decoding.strategies.threshold import ConfidenceThreshold, EntropyThreshold, Factor

_CLASSES = (
    LowConfidence,
    TopKMargin,
    ConfidenceThreshold,
    EntropyThreshold,
    Factor,
    CoherentContext,
    Guided,
    MultiBlock,
    SlowFast,
)
STRATEGIES: dict[str, type[Strategy]] = {strategy.__name__: strategy for strategy in _CLASSES}

__all__ = [
    "STRATEGIES",
    "CoherentContext",
    "ConfidenceThreshold",
    "EntropyThreshold",
    "Factor",
    "Guided",
    "LowConfidence",
    "MultiBlock",
    "SlowFast",
    "TopKMargin",
    "strategy_json",
    "strategy_of",
]


def strategy_of(content: str | Mapping[str, Any]) -> Strategy:
    """The strategy of ``Name`` or ``{Name: {field: value}}``; a strategy inside another one is written in the same way.

    Raises ValueError for another form, an unknown name or field, a field that is missing, and values out of range.
    """
    name, options = (content, {}) if isinstance(content, str) else _single(content)
    if name not in STRATEGIES:
        raise ValueError(f"no strategy {name}: choose {', '.join(STRATEGIES)}")
    known = {field.name: field.type for field in fields(STRATEGIES[name])}  # type: ignore[arg-type]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"{name} has no option {', '.join(unknown)}: its options are {', '.join(known)}")
    values = {key: strategy_of(value) if known[key] == "Strategy" else value for key, value in options.items()}
    try:
        return STRATEGIES[name](**values)
    except TypeError as error:
        raise ValueError(f"{name} needs other options: {str(error).partition(' ')[2]}") from error


def _single(content: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    if len(content) != 1 or not isinstance(options := next(iter(content.values())) or {}, Mapping):
        raise ValueError(f"a strategy is Name or {{Name: {{option: value}}}}, not {content}")
    return next(iter(content)), options


def strategy_json(strategy: Strategy) -> dict[str, Any]:
    """``{Name: {field: value}}``, which ``strategy_of`` reads back; ValueError for one that holds a model."""
    values = {field.name: getattr(strategy, field.name) for field in fields(strategy)}  # type: ignore[arg-type]
    for name, value in values.items():
        if isinstance(value, nn.Module):
            raise ValueError(f"the {name} of {type(strategy).__name__} is a model, which cannot be written: give its path")
        values[name] = strategy_json(value) if isinstance(value, Strategy) else value
    return {type(strategy).__name__: values}

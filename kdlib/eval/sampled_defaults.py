"""How a model wants to be sampled: what its generation_config.json says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from transformers import GenerationConfig

from kdlib.eval.diffusion_config import is_adapter

FILE = "generation_config.json"
NOT_APPLIED = ("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty", "no_repeat_ngram_size")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How completions are drawn. ``source``: where each number is from; ``not_applied``: what else the model asks for."""

    temperature: float
    top_p: float
    top_k: int
    source: dict[str, str]
    not_applied: dict[str, Any]

    def __str__(self) -> str:
        """``temperature 0.6 (generation_config.json), top_p 1.0 (default), top_k 0 (default)``"""
        numbers = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return ", ".join(f"{name} {value:g} ({self.source[name]})" for name, value in numbers.items())


def sampling_of(checkpoint: str, *, n: int, temperature: float | None, top_p: float | None, top_k: int | None) -> Sampling:
    """What is given, else what the checkpoint's generation config says, else plain sampling.

    A model whose config does not sample answers greedily when it is asked once; a single greedy answer is all there is, so for
    ``n`` > 1 it is sampled at the config's temperature, else at 1. Raises ValueError for temperature 0 with n > 1.
    """
    if temperature == 0 and n > 1:
        raise ValueError(f"temperature 0 gives the same answer {n} times: leave temperature out, or add --n 1")
    config = _generation_config(checkpoint)
    greedy = temperature == 0 or (temperature is None and n == 1 and not config.do_sample)
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    theirs = {} if greedy else {name: getattr(config, name) for name in given}
    plain: dict[str, float] = {"temperature": 0.0 if greedy else 1.0, "top_p": 1.0, "top_k": 0}
    found, source = {}, {}
    for name, value in given.items():
        at_hand = (("given", value), (FILE, theirs.get(name)), ("default", plain[name]))
        source[name], found[name] = next((where, one) for where, one in at_hand if one is not None)
    if n > 1 and found["temperature"] == 0:
        raise ValueError(f"{FILE} of {checkpoint} sets temperature 0, which gives the same answer {n} times: add --temperature")
    asked = {name: getattr(config, name) for name in NOT_APPLIED}
    return Sampling(
        temperature=float(found["temperature"] or 0),
        top_p=float(found["top_p"] or 1),
        top_k=int(found["top_k"] or 0),
        source=source,
        not_applied={name: value for name, value in asked.items() if value not in (None, 0, 1.0)},
    )


def _generation_config(checkpoint: str) -> GenerationConfig:
    """Of an adapter that of its base model; an empty one where there is none."""
    home = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path if is_adapter(checkpoint) else checkpoint
    try:
        return GenerationConfig.from_pretrained(home)
    except (OSError, ValueError):
        return GenerationConfig()

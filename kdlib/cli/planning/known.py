"""Shapes of published models, for plans on machines that have neither their files nor a network."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from tokenizers import Tokenizer, models
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast


def known_config(name: str) -> PreTrainedConfig | None:
    """The shape of a model that the recipes name, from ``recipes/shapes/known.json``; None for another.

    It is what the model's config.json says of widths, layers, heads and vocabulary: enough to count, not to load weights.
    """
    shapes: dict[str, Any] = json.loads((files("kdlib") / "recipes" / "shapes" / "known.json").read_text(encoding="utf-8"))
    if name not in shapes:
        return None
    found = dict(shapes[name])
    return AutoConfig.for_model(found.pop("model_type"), **found, name_or_path=name)


def blank_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of ``size`` entries that mean nothing, for rows that are only assumed."""
    words = {f"<{number}>": number for number in range(size)}
    made = Tokenizer(models.WordLevel(words, unk_token="<0>"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<0>", bos_token="<1>", eos_token="<2>", mask_token="<3>")

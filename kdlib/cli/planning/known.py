"""Shapes of published models, for plans on machines that have neither their files nor a network."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerFast

WORD = " a"  # a token of its own in every tokenizer of subwords


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
    """A tokenizer of ``size`` entries for rows that are only assumed: bytes, ``WORD``, and entries that mean nothing."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]
    words = [*symbols, space + WORD.strip()]
    vocab = {word: number for number, word in enumerate([*words, *(f"<{number}>" for number in range(len(words), size))])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[(space, WORD.strip())]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    pad, bos, eos, mask = (f"<{number}>" for number in range(len(words), len(words) + 4))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, bos_token=bos, eos_token=eos, mask_token=mask)

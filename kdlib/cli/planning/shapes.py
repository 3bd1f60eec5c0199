"""Shapes of drafts: configurations made from a target's, and models of them with random weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kdlib.cli.names import unknown
from kdlib.models import load_config, load_model, not_loadable

LADDER = (8, 4, 2)  # drafts of one eighth, a quarter and half of the target's layers


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A candidate: its name in tables, what was asked for, and a configuration or the path or id of a checkpoint."""

    name: str
    asked: Mapping[str, Any]
    source: PreTrainedConfig | str


def shapes(config: PreTrainedConfig, candidates: Sequence[Mapping[str, Any]] | None) -> list[Shape]:
    """The candidates as shapes; without any the ladder of the target's layers. ValueError for what is no shape."""
    if candidates is None:
        layers = config.num_hidden_layers
        counts = sorted({max(1, layers // part) for part in LADDER} - {layers})
        candidates = [{"num_hidden_layers": count} for count in counts]
    if not candidates:
        raise ValueError(
            "no draft to time: add --candidates '[{hidden_size: 256}]', with changes to the target's configuration"
        )
    return [_shape(config, candidate) for candidate in candidates]


def built(source: PreTrainedConfig | str, *, random: bool, dtype: str, device: torch.device) -> PreTrainedModel:
    """The model of a configuration with random weights; that of a path or id is loaded, unless ``random``."""
    if isinstance(source, str):
        if not random:
            return load_model(source, dtype=dtype).to(device)
        source = _config(source)
    as_saved = source.dtype or torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(source, dtype=as_saved if dtype == "auto" else getattr(torch, dtype)).eval()


def _config(name: str) -> PreTrainedConfig:
    try:
        return load_config(name).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(not_loadable("configuration", name, error)) from error


def _shape(config: PreTrainedConfig, asked: Mapping[str, Any]) -> Shape:
    for alone in ("prune", "path"):
        if alone in asked and len(asked) > 1:
            raise ValueError(f"a candidate with {alone} has nothing beside it, unlike {dict(asked)}")
    if "path" in asked:
        return Shape(name=Path(asked["path"]).name, asked=asked, source=str(asked["path"]))
    if "prune" in asked:
        layers = _layers(config, asked["prune"])
        return Shape(name=f"layers {', '.join(map(str, layers))}", asked=asked, source=_changed(config, {}, layers=layers))
    if not asked:
        raise ValueError("an empty candidate: it is a change to the target's configuration, such as {num_hidden_layers: 2}")
    name = ", ".join(f"{key} {value}" for key, value in asked.items())
    return Shape(name=name, asked=asked, source=_changed(config, asked, layers=None))


def _layers(config: PreTrainedConfig, layers: Any) -> list[int]:
    layers = layers["layers"] if isinstance(layers, Mapping) and set(layers) == {"layers"} else layers
    count = config.num_hidden_layers
    if not isinstance(layers, list) or not layers or layers != sorted(set(layers)) or not set(layers) <= set(range(count)):
        raise ValueError(f"prune lists the layers that stay, rising, from 0 to {count - 1}: not {layers}")
    return layers


def _changed(config: PreTrainedConfig, changes: Mapping[str, Any], *, layers: list[int] | None) -> PreTrainedConfig:
    """The configuration with ``changes``, or with these layers alone; ValueError when it is not one.

    Kinds of layers (sliding, full) are those of the layers that stay.
    """
    fields, kind = config.to_dict(), type(config).__name__
    known = {**{key: key for key in fields}, **config.attribute_map}
    for key in changes:
        if key not in known:
            raise ValueError(unknown(key, sorted(known), of=kind))
    fields |= {known[key]: value for key, value in changes.items()}
    if layers is not None:
        fields[known["num_hidden_layers"]] = len(layers)
    if fields.get("layer_types") and "layer_types" not in changes:
        count = fields[known["num_hidden_layers"]]
        kept = range(count) if layers is None else layers
        fits = count <= config.num_hidden_layers
        fields["layer_types"] = [fields["layer_types"][layer] for layer in kept] if fits else None  # None: by its default
    try:
        made = type(config).from_dict(fields)
    except StrictDataclassError as error:
        raise ValueError(f"no {kind} has {dict(changes)}: {' '.join(str(error).split())}") from error
    heads, shared = made.num_attention_heads, fields.get("num_key_value_heads")
    if shared and heads % shared:
        raise ValueError(
            f"{heads} attention heads do not share {shared} of keys and values: set num_key_value_heads to a divisor"
        )
    return made

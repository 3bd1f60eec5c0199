"""Published checkpoints into transformers classes: configuration, weights and tokenizer class; no remote code is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.peft_utils import find_adapter_config_file

from kdlib.layouts.known import LAYOUTS, ORIGINAL, layout_of, original_of


def read_config(name: str, *, revision: str | None = None) -> PreTrainedConfig | None:
    """The transformers configuration of a checkpoint (path or Hub id) of a known layout, or of an adapter of one.

    It is not causal and keeps the config.json as ``published_config``; None where transformers reads the checkpoint by itself.
    Raises OSError when there is no config.json, ValueError for a variant that no transformers class computes.
    """
    name, published = _config_json(name, revision=revision)
    if (layout := layout_of(published)) is None:
        return None
    layout.check(published)
    config = layout.config(published)
    config.update({"is_causal": False, "architectures": [layout.model], "name_or_path": name})
    if written := published.pop("diffusion", None):
        config.update({"diffusion": written})
    if said := published.get("dtype") or published.get("torch_dtype"):
        config.dtype = getattr(torch, said)
    if "auto_map" in published and not Path(name).is_dir():  # code on the Hub is found from other directories by its repository
        published["auto_map"] = {auto: f"{name}--{at.split('--')[-1]}" for auto, at in published["auto_map"].items()}
    config.update({ORIGINAL: published})
    return config


def load(name: str, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """The weights of ``name`` in the transformers class of ``config``, which ``read_config`` made; options of from_pretrained.

    Raises ValueError for a checkpoint whose parameters are not those of its layout.
    """
    layout = LAYOUTS[original_of(config)["model_type"]]  # type: ignore[index]
    made: type[PreTrainedModel] = getattr(transformers, layout.model)
    mapping = {"key_mapping": layout.key_mapping()} if layout.renames else {}
    model, report = made.from_pretrained(name, config=config, output_loading_info=True, **mapping, **options)
    if strange := sorted(report["missing_keys"] | report["unexpected_keys"]):
        raise ValueError(f"{name} is no {layout.model_type} checkpoint as published: {strange[0]} is missing or unknown")
    # save_pretrained would write the published names beside a configuration of the transformers class, as the Trainer's
    # checkpoints, which are read back by the names in memory; kdlib.layouts.save writes both as published
    model._weight_conversions = []
    return model


def tokenizer_class(name: str, *, revision: str | None = None) -> Any:
    """The transformers class for a tokenizer of ``name`` whose own class is remote code; None where it is none."""
    own = get_tokenizer_config(name, revision=revision).get("tokenizer_class", "")
    stock = {remote: ours for layout in LAYOUTS.values() for remote, ours in layout.tokenizers.items()}
    return getattr(transformers, stock[own]) if own in stock else None


def _config_json(name: str, *, revision: str | None) -> tuple[str, dict[str, Any]]:
    """The model's name, of an adapter its base model's, and the config.json; empty where there is none."""
    content, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    if not content and (adapter := find_adapter_config_file(name, revision=revision)) is not None:
        return _config_json(json.loads(Path(adapter).read_text())["base_model_name_or_path"], revision=None)
    return name, {key: value for key, value in content.items() if not key.startswith("_")}

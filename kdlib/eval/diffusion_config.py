"""Whether a model is a diffusion language model, before its weights are read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn

from kdlib.decoding.diffusion_decoder import DiffusionDecoder, decoder_of
from kdlib.diffusion import spec_of
from kdlib.models import inner, load_config


def is_adapter(model: Any) -> bool:
    """Whether ``model`` is a directory that holds a peft adapter and no whole model."""
    if not isinstance(model, str):
        return False
    return Path(model, "adapter_config.json").is_file() and not Path(model, "config.json").is_file()


def config_of(model: nn.Module | str | os.PathLike[str]) -> Any:
    """The configuration of a loaded model, or of a path or Hub id; of an adapter that of its base model.

    Raises OSError when there is none, ValueError for one that transformers does not know.
    """
    if isinstance(model, nn.Module):
        return inner(model).config
    name = os.fspath(model)
    return load_config(PeftConfig.from_pretrained(name).base_model_name_or_path if is_adapter(name) else name)


def is_diffusion(model: nn.Module | str | os.PathLike[str]) -> bool:
    """Whether the configuration is of a diffusion language model that kdlib knows; what cannot be read is none."""
    try:
        spec_of(config_of(model))
    except (OSError, ValueError):
        return False
    return True


def decoder_with(config: Any, options: Mapping[str, Any]) -> DiffusionDecoder:
    """The decoder of a configuration with some ``options`` in place of its own; ValueError for one it does not have."""
    return DiffusionDecoder.from_json({**decoder_of(config).to_json(), **options})

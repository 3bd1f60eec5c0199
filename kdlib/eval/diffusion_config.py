"""Whether a model is a diffusion language model, before its weights are read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import AutoConfig

from kdlib.diffusion import spec_of
from kdlib.layouts import read_config
from kdlib.models import inner


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
    if (published := read_config(name)) is not None:
        return published
    return AutoConfig.from_pretrained(PeftConfig.from_pretrained(name).base_model_name_or_path if is_adapter(name) else name)


def is_diffusion(model: nn.Module | str | os.PathLike[str]) -> bool:
    """Whether the configuration is of a diffusion language model that kdlib knows; what cannot be read is none."""
    try:
        spec_of(config_of(model))
    except (OSError, ValueError):
        return False
    return True

"""A model back into the layout it was published in: parameter names, config.json and the files of its own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from kdlib.layouts.known import LAYOUTS, original_of


def save(
    model: PreTrainedModel, directory: Path, *, state_dict: Mapping[str, Tensor] | None = None, dtype: torch.dtype | None = None
) -> bool:
    """Writes ``model`` (or ``state_dict``, its parameters by name) as it was published; False, and nothing, for any other one.

    config.json is the original one with the sizes the model has now, ``dtype`` (the model's own) and the ``diffusion`` entry.
    Python files beside a local original are copied, not run, so that its remote code loads the new directory.
    """
    original = original_of(model.config)
    if original is None:
        return False
    layout, config = LAYOUTS[original["model_type"]], model.config
    state = dict(model.state_dict() if state_dict is None else state_dict)
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    directory.mkdir(parents=True, exist_ok=True)
    save_torch_state_dict({layout.published_name(name): tensor for name, tensor in state.items()}, directory)
    content = layout.published(config, original=original)
    content["torch_dtype"] = str(dtype or model.dtype).removeprefix("torch.")
    if "dtype" in content:
        content["dtype"] = content["torch_dtype"]
    if (written := getattr(config, "diffusion", None)) is not None:  # not every configuration has the entry
        content |= _diffusion(written, known=content)
    (directory / "config.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)
    _copy_code(Path(config.name_or_path), directory)
    return True


def _diffusion(written: dict[str, Any], *, known: Mapping[str, Any]) -> dict[str, Any]:
    """The ``diffusion`` entry, and its mask token where config.json names one too."""
    mask = {"mask_token_id": written["mask_token_id"]} if "mask_token_id" in known else {}
    return {"diffusion": written, **mask}


def _copy_code(source: Path, directory: Path) -> None:
    if source.is_dir() and source.resolve() != directory.resolve():
        for file in source.glob("*.py"):
            shutil.copyfile(file, directory / file.name)

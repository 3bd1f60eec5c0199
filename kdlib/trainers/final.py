"""The result of a run: weights, tokenizer, chat template and generation config in one loadable directory."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig

from kdlib import layouts

MODULES = "kdlib_modules"  # what a student carries for its objective, and is not published with


def save_final(trainer: Any, directory: Path) -> Path:
    """Writes the student as safetensors in the dtype it was published in, with tokenizer and generation config.

    A student of ``kdlib.layouts`` is written under its published names, so that its own code loads it as well. An adapter is
    merged unless ``merge_adapter`` is off or the base is quantised, where merging would lose precision.
    """
    # FSDP gathers here, on every rank
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
    if not trainer.is_world_process_zero():
        return directory
    model = trainer.accelerator.unwrap_model(trainer.model)
    dtype = trainer.published_dtype
    if (
        isinstance(model, PeftModel)
        and trainer.args.merge_adapter
        and not getattr(model.get_base_model(), "is_quantized", False)
    ):
        model, state = _merged(model), None
    if not isinstance(model, PeftModel):
        _generation_config(model, trainer.processing_class)
        state = state or model.state_dict()
        weights = _cast({name: x for name, x in state.items() if not name.startswith(f"{MODULES}.")}, dtype)
        if not layouts.save(model, directory, state_dict=weights, dtype=dtype):
            model.save_pretrained(directory, state_dict=weights)
            model.config.dtype, kept = dtype, model.config.dtype  # save_pretrained has written the dtype trained in
            model.config.save_pretrained(directory)
            model.config.dtype = kept
    else:
        model.save_pretrained(directory, state_dict=state)
    trainer.processing_class.save_pretrained(directory)
    return directory


def _merged(model: PeftModel) -> nn.Module:
    """A merged copy in the host's memory: training may go on with the adapter as it is, and needs the device's."""
    here: dict[int, Any] = {id(x): nn.Parameter(x.detach().to("cpu", copy=True), x.requires_grad) for x in model.parameters()}
    here |= {id(x): x.to("cpu", copy=True) for x in model.buffers()}
    return copy.deepcopy(model, here).merge_and_unload()


def _generation_config(model: Any, tokenizer: Any) -> None:
    """A student made from a configuration has none that ends its turns: the tokenizer knows the ids."""
    config = model.generation_config or GenerationConfig.from_model_config(model.config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name) is None:
            setattr(config, name, getattr(tokenizer, name))
    model.generation_config = config


def _cast(state: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All floating tensors in ``dtype``; tied ones stay one tensor, so that they are written once."""
    made: dict[int, torch.Tensor] = {}
    for tensor in state.values():
        made.setdefault(tensor.data_ptr(), tensor.to(dtype) if tensor.is_floating_point() else tensor)
    return {name: made[tensor.data_ptr()] for name, tensor in state.items()}

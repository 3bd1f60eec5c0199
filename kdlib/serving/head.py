"""The head of a checkpoint without its backbone: the lm_head's tensors are read, everything else stays on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import cached_file

from kdlib.head import Head

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"


@torch.no_grad()
def checkpoint_head(
    name: str, config: PretrainedConfig, *, dtype: torch.dtype, revision: str | None = None, trust_remote_code: bool = False
) -> Head:
    """The Head of the checkpoint ``name`` (a directory or Hub id) with ``config``, in ``dtype`` on the CPU.

    Raises ValueError when the checkpoint has no safetensors with a head in them, or when the model does more to its logits than
    Head knows.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    layer = model.get_output_embeddings()
    files = _files(name, revision=revision)
    names = {id(module): module_name for module_name, module in model.named_modules()}
    tied = model.get_input_embeddings() if config.get_text_config().tie_word_embeddings else layer
    keys = [f"{names[id(module)]}.weight" for module in (layer, tied)]
    layer.weight = nn.Parameter(_read(files, keys, checkpoint=name).to(dtype), requires_grad=False)
    if layer.bias is not None:
        layer.bias = nn.Parameter(_read(files, [f"{names[id(layer)]}.bias"], checkpoint=name).to(dtype), requires_grad=False)
    _check(model, layer.weight)
    return Head.of(model)


def _files(name: str, *, revision: str | None) -> dict[str, str]:
    """{tensor name: file} of the checkpoint."""
    options: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    index = cached_file(name, _INDEX, **options)
    if index is not None:
        places = json.loads(Path(index).read_text())["weight_map"]
        return {key: cached_file(name, file, revision=revision) for key, file in places.items() if _may_be_head(key)}
    whole = cached_file(name, _WHOLE, **options)
    if whole is None:
        raise ValueError(f"{name} holds no safetensors, from which the teacher's head is read: save it with save_pretrained")
    with safe_open(whole, framework="pt") as content:
        return dict.fromkeys(content.keys(), whole)


def _may_be_head(key: str) -> bool:
    """Not in the layers, whose files are not fetched for nothing."""
    return ".layers." not in key and ".h." not in key


def _read(files: dict[str, str], keys: list[str], *, checkpoint: str) -> Tensor:
    """The first of ``keys`` that the checkpoint has, under that name or with another prefix."""
    for key in keys:
        short = ".".join(key.split(".")[-2:])
        found = [key] if key in files else [other for other in files if other.endswith(short)]
        if len(found) == 1:
            with safe_open(files[found[0]], framework="pt") as content:
                return content.get_tensor(found[0])
    raise ValueError(f"{checkpoint} has no {' or '.join(dict.fromkeys(keys))} among its tensors: which is its head?")


class _BackboneOutput:
    """A backbone's output with the last hidden state alone; whatever else a model copies from it is None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, place: int | slice) -> Any:
        return (self.last_hidden_state,)[place]

    def __getattr__(self, name: str) -> None:
        return None


def _check(model: PreTrainedModel, weight: Tensor) -> None:
    """ValueError unless Head.of(model) equals what the model itself makes of hidden states; the backbone is not run."""
    hidden = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    model.get_decoder().forward = lambda *_, **__: _BackboneOutput(hidden)
    theirs = model(input_ids=torch.arange(4)[None], use_cache=False).logits[0].float()
    ours = Head.of(model)(hidden[0]).float()
    tolerance = 1e-3 if weight.dtype == torch.float32 else 5e-2
    if (ours - theirs).abs().max() > tolerance * theirs.abs().max().clamp(min=1.0):
        raise ValueError(
            f"the teacher ({type(model).__name__}) does more to its logits than kdlib.head.Head knows: please report the model"
        )

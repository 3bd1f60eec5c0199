"""A draft cut out of its target: some of the decoder layers, and everything else as it is."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

# what a config says layer by layer
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")


def pruned(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A model of the same class with copies of these decoder layers of ``model`` (0-based, ascending) and of all but layers.

    Embeddings, final norm and head are the target's, so it speaks the same vocabulary; its dtype, device and training mode are
    the target's too. For decoders whose layers do not depend on their number (Llama, Qwen, Mistral, Gemma and the like).
    Raises ValueError for no layers, layers that are repeated or not there, and models whose layers do.
    """
    config = _config(model, layers)
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten: the caller's own draws go on as before
        made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    try:
        made.load_state_dict(_state(model, layers))
    except RuntimeError as error:
        raise ValueError(
            f"layers {list(layers)} of {type(model).__name__} do not fit the places they would take: "
            "its layers differ by their number, and it cannot be pruned this way"
        ) from error
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).train(model.training)


def _config(model: PreTrainedModel, layers: Sequence[int]) -> PreTrainedConfig:
    config: PreTrainedConfig = copy.deepcopy(model.config)
    text = config.get_text_config()
    there = range(text.num_hidden_layers)
    if not layers or list(layers) != sorted(set(layers)) or not set(layers) <= set(there):
        raise ValueError(f"layers {list(layers)}: give ascending numbers from 0 to {there[-1]}, each at most once")
    per_layer = {name: values for name, values in text.to_dict().items() if name in _PER_LAYER and values is not None}
    kept = {name: [values[layer] for layer in layers] for name, values in per_layer.items()}
    text.update({**kept, "num_hidden_layers": len(layers)})
    return config


def _state(model: PreTrainedModel, layers: Sequence[int]) -> dict[str, Tensor]:
    """The target's weights without the other layers, these renumbered from 0."""
    stack = model.get_decoder().layers
    [stem] = [name for name, module in model.named_modules() if module is stack]
    place = {f"{stem}.{layer}": f"{stem}.{new}" for new, layer in enumerate(layers)}
    found = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{stem}."):
            found[name] = tensor
            continue
        layer = f"{stem}.{name.removeprefix(f'{stem}.').partition('.')[0]}"
        if layer in place:
            found[place[layer] + name.removeprefix(layer)] = tensor
    return found

"""A student's weights as a plain checkpoint has them: names as saved, adapters merged, each tied tensor once."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from kdlib.models import inner

Weights = Iterator[tuple[str, Tensor]]


def merged_weights(model: nn.Module, *, untied: bool = False) -> Weights:
    """(name, tensor) of a transformers or peft model, as ``save_pretrained`` would write it merged; training is not disturbed.

    untied: give tied output embeddings under their own name too, for an engine that keeps two tensors.

    Adapted layers are merged one at a time, in copies, so that no second model is held (except for architectures that are laid
    out differently on disk, such as mixtures of experts). Raises ValueError for what cannot be merged: a quantised base,
    single trained tokens, or an adapter on one of two tied embeddings.
    """
    base = inner(model)
    _check_ties(base)
    if get_model_conversion_mapping(base, add_legacy=False):
        yield from revert_weight_conversion(base, dict(_weights(base, "", set()))).items()
    else:
        yield from _weights(base, "", set())
    if untied and is_tied(base):
        head = base.get_output_embeddings().weight
        yield next((n, p.detach()) for n, p in reversed([*base.named_parameters(remove_duplicate=False)]) if p is head)


def is_tied(model: nn.Module) -> bool:
    """Whether input and output embeddings are one tensor."""
    return bool(inner(model).config.get_text_config().tie_word_embeddings)


def _weights(module: nn.Module, prefix: str, seen: set[nn.Parameter]) -> Weights:
    """Parameters and saved buffers of ``module`` under the names they have without an adapter."""
    if isinstance(module, BaseTunerLayer):
        yield from _weights(_merged(module, prefix), prefix, seen)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        yield from _weights(_active(module, prefix), prefix, seen)
        return
    for name, parameter in module.named_parameters(recurse=False):
        if parameter not in seen:  # tied to one that came before
            seen.add(parameter)
            yield prefix + name, parameter.detach()
    for name, buffer in module.named_buffers(recurse=False):
        if name not in module._non_persistent_buffers_set:
            yield prefix + name, buffer
    for name, child in module.named_children():
        yield from _weights(child, f"{prefix}{name}.", seen)


@torch.no_grad()
def _merged(layer: nn.Module, prefix: str) -> nn.Module:
    """The base layer with its active adapters in its weights; a copy, unless the adapters are off."""
    assert isinstance(layer, BaseTunerLayer)
    if any(not weight.is_floating_point() for weight in layer.get_base_layer().parameters()):
        raise ValueError(
            f"{prefix.rstrip('.')} is quantised, and its adapter cannot be merged for the rollout engine: "
            "load the student unquantised, or use rollout.engine hf"
        )
    if layer.disable_adapters:
        return layer.get_base_layer()
    merged: nn.Module = copy.deepcopy(layer)
    while isinstance(merged, BaseTunerLayer):  # adapters on parameters wrap one another
        merged.merge()
        merged = merged.base_layer
    return merged


def _active(wrapper: AuxiliaryTrainingWrapper, prefix: str) -> nn.Module:
    """The copy that is trained when a module is among ``modules_to_save``."""
    if not isinstance(wrapper, ModulesToSaveWrapper):
        raise ValueError(
            f"{prefix.rstrip('.')}: single trained tokens cannot be sent to a rollout engine: use rollout.engine hf"
        )
    return wrapper.original_module if wrapper.disable_adapters else wrapper.modules_to_save[wrapper.active_adapters[0]]


def _check_ties(base: nn.Module) -> None:
    ends = base.get_input_embeddings(), base.get_output_embeddings()  # type: ignore[operator]
    adapted = [isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in ends]
    if any(adapted) and is_tied(base):
        raise ValueError(
            "the student's input and output embeddings are tied and have an adapter: a checkpoint cannot hold two versions; "
            "leave them out of the adapter's target modules, untie them first, or use rollout.engine hf"
        )


@torch.no_grad()
def untie(model: nn.Module) -> None:
    """Gives the output embeddings a tensor of their own, in place; what the model computes stays the same.

    Training then changes the two apart, and a checkpoint holds both.
    """
    base = inner(model)
    if not is_tied(base):
        return
    head = base.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=head.weight.requires_grad)
    base.config.get_text_config().tie_word_embeddings = base.config.tie_word_embeddings = False
    base.all_tied_weights_keys = {}

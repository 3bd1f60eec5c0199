"""The projection from hidden states to logits: the only place for lm_head weights, logit scales, soft caps and LoRA pairs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when an input is float64, float32 otherwise."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def wide_matmul(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b, accumulated and emitted in float32 (float64 for float64 inputs), also under autocast.

    16-bit inputs are multiplied as they are on CUDA (outside autograd) and exactly elsewhere. ``out``: a buffer to write
    into, outside autograd.
    """
    recorded = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == b.dtype and a.dtype.itemsize == 2 and not recorded:
            return torch.mm(a, b, out_dtype=torch.float32)
        dtype = accumulation_dtype(a, b)
        return torch.mm(a.to(dtype), b.to(dtype), out=out)


@dataclass(frozen=True, kw_only=True)
class Head:
    """logits = softcap(scale * (h W' + b + s (h A') B')).

    ``weight`` [V, D], ``bias`` [V], ``lora`` the pair A [r, D], B [V, r] and its factor s. ``softcap`` c: z -> c tanh(z / c).
    ``dtype``: what hidden states and weights are cast to before they are multiplied (the autocast dtype), None for their own.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    lora: tuple[Tensor, Tensor, float] | None = None
    dtype: torch.dtype | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def __call__(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """[n, D] -> [n, V] logits in float32 (float64 for float64 inputs); ``out`` as in ``project``."""
        return self.finish(self.project(hidden, out=out))

    def project(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        """h W' + b + s (h A') B', before scale and soft cap; ``out``: a buffer [n, V] to reuse, outside autograd."""
        dtype = self.dtype or hidden.dtype
        projected = wide_matmul(hidden.to(dtype), self.weight.to(self.dtype or self.weight.dtype).T, out=out)
        if self.lora is not None:
            a, b, s = self.lora
            # the pair is small, so its product is taken in full width whatever dtype peft keeps it in
            projected = projected + s * wide_matmul(wide_matmul(hidden.to(a.dtype), a.T), b.T)
        return projected if self.bias is None else projected + self.bias.to(projected.dtype)

    def finish(self, projected: Tensor) -> Tensor:
        """Logit scale, then soft cap, as the models that have both apply them."""
        logits = projected if self.scale == 1.0 else projected * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def to(self, device: torch.device) -> Head:
        """The head on ``device``; itself when it is there."""
        if self.weight.device == device:
            return self
        lora = None if self.lora is None else (self.lora[0].to(device), self.lora[1].to(device), self.lora[2])
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias, lora=lora)

    def detached(self) -> Head:
        """The head without gradients."""
        lora = None if self.lora is None else (self.lora[0].detach(), self.lora[1].detach(), self.lora[2])
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach(), lora=lora)

    def sliced(self, vocab_size: int) -> Head:
        """The head of the first ``vocab_size`` entries; itself when it has no more than these."""
        if vocab_size >= self.out_features:
            return self
        lora = None if self.lora is None else (self.lora[0], self.lora[1][:vocab_size], self.lora[2])
        bias = None if self.bias is None else self.bias[:vocab_size]
        return replace(self, weight=self.weight[:vocab_size], bias=bias, lora=lora)

    @staticmethod
    def of(model: nn.Module, *, vocab_size: int | None = None, dtype: torch.dtype | None = None) -> Head:
        """The head of a transformers or peft causal language model.

        Raises ValueError for adapters on the head that this form cannot express (dropout, DoRA) and for sharded weights.
        """
        layer = _active(model.get_output_embeddings())  # type: ignore[operator]
        if layer is None:
            raise ValueError(f"{type(model).__name__} has no output embeddings: a causal language model is needed")
        scale, softcap = _logit_transform(model.config.get_text_config())  # type: ignore[union-attr, operator]
        base = layer.base_layer if hasattr(layer, "base_layer") else layer
        head = Head(weight=_plain(base.weight), bias=base.bias, scale=scale, softcap=softcap, lora=_lora(layer), dtype=dtype)
        return head if vocab_size is None else head.sliced(vocab_size)


# The functions below are the adapter to transformers and peft: the one place that probes foreign objects for attributes.


def _active(layer: Any) -> Any:
    """The copy that peft trains when the head is among its ``modules_to_save``."""
    if hasattr(layer, "modules_to_save") and not layer.disable_adapters:
        return layer.modules_to_save[layer.active_adapters[0]]
    return layer.original_module if hasattr(layer, "original_module") else layer


def _plain(weight: Tensor) -> Tensor:
    if hasattr(weight, "full_tensor"):
        raise ValueError("the lm_head is sharded here: read it inside the wrapped model's forward, where FSDP has gathered it")
    if weight.ndim != 2 or not weight.dtype.is_floating_point:
        raise ValueError("the lm_head is quantised or partitioned: keep it unquantised (and use ZeRO stage 1 or 2)")
    return weight


def _lora(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return None
    if len(names) > 1 or getattr(layer, "lora_variant", None):
        raise ValueError(
            "one plain LoRA adapter on lm_head is supported: drop DoRA or the second adapter, or leave lm_head out"
        )
    name = names[0]
    if getattr(layer.lora_dropout[name], "p", 0.0) > 0.0:
        raise ValueError(
            "LoRA dropout on lm_head is not supported: set lora_dropout to 0, or leave lm_head out of the target modules"
        )
    if layer.lora_B[name].bias is not None:
        raise ValueError("a LoRA bias on lm_head is not supported: set lora_bias to false")
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def _logit_transform(config: Any) -> tuple[float, float | None]:
    """(scale, softcap): Cohere multiplies by ``logit_scale``, Granite divides by ``logits_scaling``, Gemma caps."""
    scale = float(getattr(config, "logit_scale", None) or 1.0) * float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)

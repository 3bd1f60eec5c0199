"""Running a method inside a wrapper's forward, where DDP and FSDP have their hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def inside_forward(wrapper: nn.Module, wrapped: nn.Module, method: Callable[..., Any], *arguments: Any) -> Any:
    """``method(*arguments)``, called where ``wrapped.forward`` would be when ``wrapper`` is called.

    Gradients are then averaged by DDP and parameters gathered by FSDP. The method must return tensors in plain containers: FSDP
    looks for them to hook the backward pass. It replaces ``forward``, so autocast patched onto that does not apply inside.
    """
    patched = "forward" in vars(wrapped)
    original = wrapped.forward

    def restore() -> None:
        if patched:
            wrapped.forward = original
        elif "forward" in vars(wrapped):
            del wrapped.forward

    def forward(*inputs: Any) -> Any:
        restore()  # the method calls submodules, and may call the real forward
        return method(*inputs)

    wrapped.forward = forward
    try:
        return wrapper(*arguments)
    finally:
        restore()

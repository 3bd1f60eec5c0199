"""Checkpoints whose parameter names are not those of a transformers class, read and written without remote code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

if TYPE_CHECKING:
    from kdlib.layouts.base import Layout
    from kdlib.layouts.known import layout_of
    from kdlib.layouts.read import load, read_config, tokenizer_class
    from kdlib.layouts.write import save

_HOME = {
    "Layout": "base",
    "layout_of": "known",
    "load": "read",
    "read_config": "read",
    "save": "write",
    "tokenizer_class": "read",
}

__all__ = ["Layout", "layout_of", "load", "read_config", "save", "tokenizer_class"]

__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})

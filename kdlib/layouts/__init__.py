"""Checkpoints whose parameter names are not those of a transformers class, read and written without remote code."""

from kdlib.layouts.base import Layout
from kdlib.layouts.known import layout_of, original_of
from kdlib.layouts.read import load, read_config, tokenizer_class
from kdlib.layouts.write import save

__all__ = ["Layout", "layout_of", "load", "original_of", "read_config", "save", "tokenizer_class"]

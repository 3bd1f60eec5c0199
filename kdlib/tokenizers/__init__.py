"""Tokenizers compared and named by their content."""

from __future__ import annotations

from kdlib.tokenizers.identity import (
    explain_difference,
    same_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from kdlib.tokenizers.pieces import token_bytes
from kdlib.tokenizers.surface import surface_vectors

__all__ = [
    "explain_difference",
    "same_tokenizer",
    "surface_vectors",
    "template_fingerprint",
    "token_bytes",
    "tokenizer_fingerprint",
]

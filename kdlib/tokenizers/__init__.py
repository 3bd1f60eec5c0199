"""Tokenizers compared and named by their content."""

from __future__ import annotations

from kdlib.tokenizers.identity import (
    explain_difference,
    same_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)

__all__ = ["explain_difference", "same_tokenizer", "template_fingerprint", "tokenizer_fingerprint"]

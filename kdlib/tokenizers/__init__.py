"""Tokenizers compared and named by their content, their texts aligned by bytes, their tokens carried over to models."""

from __future__ import annotations

from kdlib.tokenizers.alignment import align
from kdlib.tokenizers.identity import (
    explain_difference,
    same_tokenizer,
    template_fingerprint,
    tokenizer_fingerprint,
)
from kdlib.tokenizers.pieces import token_bytes
from kdlib.tokenizers.pure_bytes import byte_tokenizer
from kdlib.tokenizers.spans import LossyTokenizationError, byte_spans, keeps_spaces, spans_in_text, spans_of_ids
from kdlib.tokenizers.surface import surface_vectors
from kdlib.tokenizers.transplant import transplanted_rows
from kdlib.tokenizers.vocabularies import shared_tokens, space_tokens

__all__ = [
    "LossyTokenizationError",
    "align",
    "byte_spans",
    "byte_tokenizer",
    "explain_difference",
    "keeps_spaces",
    "same_tokenizer",
    "shared_tokens",
    "space_tokens",
    "spans_in_text",
    "spans_of_ids",
    "surface_vectors",
    "template_fingerprint",
    "token_bytes",
    "tokenizer_fingerprint",
    "transplanted_rows",
]

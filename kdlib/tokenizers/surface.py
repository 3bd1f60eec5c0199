"""Tokens as vectors of what they look like: hashed byte n-grams."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def surface_vectors(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, width: int = 256) -> Tensor:
    """[V, width] counts of the byte n-grams (n = 1, 2, 3) of each token's text."""
    raise NotImplementedError

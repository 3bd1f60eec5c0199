"""Tokens as vectors of what they look like: hashed byte n-grams."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from kdlib.tokenizers.pieces import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BOUNDARY, _UNITS = 256, 257  # a unit of text is a byte, or the boundary before and after a token
_CODE = 16  # columns of a token that is no text

Features = tuple[NDArray[np.int64], NDArray[np.int64]]  # (row, column) of each count


def surface_vectors(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int, width: int = 256) -> Tensor:
    """[V, width] float32: x[t, h(g)] counts the byte n-grams g (n = 1, 2, 3) of token t's bytes, with a boundary at both ends.

    For costs between the tokens of one vocabulary, or of two, without embeddings of either:
    ``Sinkhorn(geometry="sample", token_points="surface")``. The column h(g) = xxhash64(g) mod width is the same for all
    tokenizers and machines, so equal texts have equal vectors (cosine distance 0) in any two of them. A leading space is a byte
    as others are, and prefixes and suffixes count, as n-grams with the boundary: "cat" is near " cat" and "cats", not "xyz".

    A special token is no text: its whole content is hashed into 16 columns, so that it equals its namesake and is nearly
    orthogonal to text and to other special tokens; an id without a token the same, of its number.
    Raises ValueError for a tokenizer whose bytes are not known (``token_bytes``).
    """
    found = token_bytes(tokenizer, vocab_size=vocab_size)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    codes = {
        index: b"special " + text if text else b"empty %d" % index
        for index, text in enumerate(found)
        if index in special or not text
    }
    texts = [b"" if index in codes else text for index, text in enumerate(found)]
    features = [*_ngrams(texts, width), _whole(codes, width)]
    rows, columns = (np.concatenate(part) for part in zip(*features, strict=True))
    places = torch.from_numpy(rows * width + columns)
    return torch.zeros(vocab_size * width).scatter_add_(0, places, torch.ones(len(places))).view(vocab_size, width)


def _ngrams(texts: list[bytes], width: int) -> Iterable[Features]:
    """The n-grams of all texts, n by n; none of empty texts."""
    rows, units = _joined(texts)
    start = np.flatnonzero(units != _BOUNDARY)
    yield rows[start], _columns(units[start], width)
    for n in (2, 3):
        start = np.flatnonzero(rows[: 1 - n] == rows[n - 1 :])
        grams = sum(units[start + i] * _UNITS ** (n - 1 - i) for i in range(n))
        # above all shorter ones, so that no two n-grams have one number
        yield rows[start], _columns(grams + sum(_UNITS**shorter for shorter in range(1, n)), width)


def _joined(texts: list[bytes]) -> Features:
    """The row and the unit of every place: each text between two boundaries, empty texts left out."""
    lengths = np.array([len(text) + 2 if text else 0 for text in texts], np.int64)
    rows = np.repeat(np.arange(len(texts)), lengths)
    units = np.full(len(rows), _BOUNDARY, np.int64)
    end = lengths.cumsum()[lengths > 0]
    inside = np.ones(len(rows), bool)
    inside[end - 1] = inside[end - lengths[lengths > 0]] = False
    units[inside] = np.frombuffer(b"".join(texts), np.uint8)
    return rows, units


def _columns(grams: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """The column of each n-gram's number; each different one is hashed once."""
    different, which = np.unique(grams, return_inverse=True)
    hashed = [xxhash.xxh64_intdigest(gram.to_bytes(8, "little")) % width for gram in different.tolist()]
    return np.array(hashed, np.int64)[which]


def _whole(codes: dict[int, bytes], width: int) -> Features:
    """16 columns for each of the tokens that are no text."""
    rows = np.repeat(np.array(list(codes), np.int64), _CODE)
    hashed = [xxhash.xxh64_intdigest(code, seed=1 + i) % width for code in codes.values() for i in range(_CODE)]
    return rows, np.array(hashed, np.int64)

"""A tokenizer as far as the bytes of its tokens are concerned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdlib.tokenizers import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLES = ("a b", " a", "a  b\nc")


@dataclass(frozen=True)
class Reader:
    """What ``tokenizer``'s tokens spell, looked up once."""

    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def pieces(self) -> list[bytes]:
        """The bytes of each token."""
        return token_bytes(self.tokenizer)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """How many bytes each token has."""
        return np.array([len(piece) for piece in self.pieces], np.int64)

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that are no text."""
        marked = {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return frozenset(marked | set(self.tokenizer.all_special_ids))

    def text(self, ids: Sequence[int]) -> bytes:
        """The bytes that the tokens spell, special ones as they are written."""
        return b"".join(map(self.pieces.__getitem__, ids))

    def continued(self, text: str) -> list[int]:
        """Tokens of a text that goes on from another, without the space that some tokenizers put in front of a text.

        Raises ValueError when they do not spell the text.
        """
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        wanted = text.encode()
        if self.text(ids) == wanted:
            return ids
        ids = self.tokenizer.encode("\n" + text, add_special_tokens=False)
        for n in range(1, min(len(ids), 3) + 1):
            if self.text(ids[n:]) == wanted:
                return ids[n:]
        raise ValueError(f"the tokens of {text[:40]!r} spell another text")

    def check(self, who: str) -> None:
        """ValueError for a tokenizer whose tokens leave out bytes of every text, as those of WordPiece leave out spaces."""
        for sample in _SAMPLES:
            spelled = self.text(self.tokenizer.encode(sample, add_special_tokens=False))
            if spelled.lstrip(b" ") != sample.encode().lstrip(b" "):
                raise ValueError(
                    f"the {who}'s tokenizer is not lossless: it reads {sample!r} as {spelled.decode(errors='replace')!r}, so "
                    "that its tokens cannot be aligned with another's; use a model with a byte-level or SentencePiece tokenizer"
                )

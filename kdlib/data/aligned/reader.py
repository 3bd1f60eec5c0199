"""A tokenizer as far as the bytes of its tokens are concerned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdlib.tokenizers import token_bytes
from kdlib.tokenizers.pieces import special_tokens, unknown_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAMPLES = ("a b", " a", "a  b\nc")
_BEFORE = ("\n", ":", "1")  # with one of them before it, a text is tokenised as one that goes on
_NO_TEXT = b"\xff"  # in no UTF-8, so that it is equal to nothing that is read


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
        return frozenset(special_tokens(self.tokenizer))

    @cached_property
    def unknown(self) -> frozenset[int]:
        """Tokens that stand for any text which the tokenizer does not know."""
        return unknown_ids(self.tokenizer)

    @property
    def padding(self) -> int:
        """What rows are padded with: any token does, as it is masked, and many base models name none."""
        found = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(index for index in found if index is not None)

    def text(self, ids: Sequence[int]) -> bytes:
        """The bytes that the tokens spell, special ones as they are written; 0xFF for an id beyond the tokenizer's."""
        try:
            return b"".join([self.pieces[index] for index in ids])
        except IndexError:
            return b"".join([self.pieces[index] if index < len(self.pieces) else _NO_TEXT for index in ids])

    def sizes(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n]: how many bytes each of the tokens has in ``text``."""
        last = len(self.lengths) - 1
        return np.where(ids > last, len(_NO_TEXT), self.lengths[np.minimum(ids, last)])

    def continued(self, text: str) -> list[int]:
        """Tokens of a text that goes on from another, without the space that some tokenizers put in front of a text.

        Raises ValueError when they do not spell the text.
        """
        wanted = text.encode()
        for before in ("", *_BEFORE):
            ids = self.tokenizer.encode(before + text, add_special_tokens=False)
            for n in range(min(len(ids), 3) + 1) if before else (0,):
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

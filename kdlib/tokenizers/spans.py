"""Which bytes of a text each of its tokens stands for."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from kdlib.tokenizers.alignment import end_to_end
from kdlib.tokenizers.pieces import token_bytes, unknown_ids, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Unicode's White_Space in UTF-8: what tokenizers that split at spaces leave out, and added tokens with lstrip or rstrip take.
_SPACES = re.compile(rb"(?:[\t-\r ]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)+")
_ASCII_SPACES = np.isin(np.arange(256), list(b"\t\n\v\f\r "))
_BYTE = re.compile(rb"<0x[0-9A-F]{2}>")


class LossyTokenizationError(ValueError):
    """The tokens do not spell the text byte by byte, so that it is not known which bytes each stands for."""


def byte_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool = False
) -> tuple[list[int], NDArray[np.int64]]:
    """(ids, spans [n, 2]): the text's tokens; first byte and the byte after the last of each in ``text.encode()``, in order.

    The bytes at a span are those of the token (``token_bytes``), compared one by one; neither ``decode`` nor the tokenizer's
    offsets are asked. A space that the tokenizer puts before the text has no bytes in it: a lone ``▁`` has an empty span,
    ``▁Hello`` that of "Hello". A special token in the text spans what is written, with the spaces that it takes on its sides
    (lstrip, rstrip); one that ``add_special_tokens`` adds has an empty span. Spans cover the text, but for spaces where
    ``keeps_spaces`` is false.

    Raises LossyTokenizationError where the tokens spell another text: normalised, with unknown tokens, or with a literal "▁" or
    "<0x41>" that was read as a space or a byte. Raises ValueError for tokenizers whose bytes are not known.
    """
    encoded = tokenizer(
        text, add_special_tokens=add_special_tokens, return_special_tokens_mask=add_special_tokens, verbose=False
    )
    ids: list[int] = encoded["input_ids"]
    if not add_special_tokens:
        return ids, spans_in_text(tokenizer, text, ids)
    inside = np.asarray(encoded["special_tokens_mask"]) == 0
    spans = spans_in_text(tokenizer, text, [index for index, own in zip(ids, inside.tolist(), strict=True) if own])
    before = np.concatenate([[0], spans[:, 1]])[inside.cumsum()]
    found = np.stack([before, before], 1)
    found[inside] = spans
    return ids, found


def spans_in_text(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> NDArray[np.int64]:
    """``byte_spans`` of ids that ``text`` was tokenised into, without special tokens around it: for texts tokenised at once."""
    return _table(tokenizer, ids).in_text(text.encode(), ids)


def spans_of_ids(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, begins_text: bool = True
) -> tuple[bytes, NDArray[np.int64]]:
    """(text, spans [n, 2]): the bytes that sampled ids spell, which need not be whole characters, and where each is in them.

    Special tokens are no text: their spans are empty. With ``begins_text`` the first space of tokenizers that put one before a
    text is taken for that and is no text either (many write " a" and "a" alike); ids that go on after others keep theirs.

    Raises LossyTokenizationError for unknown tokens, for ids without a token, and where ``keeps_spaces`` is false.
    """
    return _table(tokenizer, ids).of_ids(ids, begins_text=begins_text)


def keeps_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether every byte of a text lies in a token: false where spaces between words are left out (WordPiece)."""
    return _table(tokenizer).keeps_spaces


@dataclass(frozen=True, kw_only=True)
class _Table:
    """What is read from a tokenizer once; index = id. It holds no tokenizer, so that it does not outlive its own.

    pieces, lengths: bytes as in a text; spelt, spelt_lengths: the same, empty for special tokens. added: tokens that are found
    before the text is split. prefix: whether a space is put before a text.
    """

    pieces: list[bytes]
    lengths: NDArray[np.int64]
    spelt: list[bytes]
    spelt_lengths: NDArray[np.int64]
    added: Mapping[int, Any]
    unknown: frozenset[int]
    keeps_spaces: bool
    prefix: bool

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> _Table:
        pieces, added = token_bytes(tokenizer), dict(tokenizer.added_tokens_decoder)
        spelt = [b"" if index in added and added[index].special else piece for index, piece in enumerate(pieces)]
        alone, two = (written(tokenizer, text).replace("x", "") for text in ("x", "x x"))  # what stands for spaces
        return cls(
            pieces=pieces,
            lengths=_lengths(pieces),
            spelt=spelt,
            spelt_lengths=_lengths(spelt),
            added=added,
            unknown=unknown_ids(tokenizer),
            keeps_spaces=len(two) > len(alone),
            prefix=bool(alone),
        )

    def in_text(self, source: bytes, ids: Sequence[int]) -> NDArray[np.int64]:
        """Where the tokens are in the text: at once if they spell it with nothing between them, else one by one."""
        joined = b"".join([self.pieces[index] for index in ids])
        lengths = self.lengths[np.asarray(ids, np.int64)]
        if joined == source:
            return end_to_end(lengths)
        if joined[:1] == b" " and joined[1:] == source:
            return np.maximum(end_to_end(lengths) - 1, 0)
        spans = None if self.keeps_spaces else _between_spaces(source, joined, lengths)
        return self._one_by_one(source, ids) if spans is None else spans

    def of_ids(self, ids: Sequence[int], *, begins_text: bool) -> tuple[bytes, NDArray[np.int64]]:
        if not self.keeps_spaces:
            raise LossyTokenizationError(
                "this tokenizer leaves out the spaces between words, so its ids do not say which text they spell: "
                "use a tokenizer whose tokens hold the spaces (byte-level BPE, SentencePiece)"
            )
        index = np.asarray(ids, np.int64)
        nothing = (index < 0) | (index >= len(self.spelt)) | np.isin(index, list(self.unknown))
        if nothing.any():
            place = int(nothing.argmax())
            what = "the unknown token" if ids[place] in self.unknown else "no token of the tokenizer"
            raise LossyTokenizationError(
                f"token {place} (id {ids[place]}) is {what} and spells no text: leave the sequence out"
            )
        text, spans = b"".join([self.spelt[i] for i in ids]), end_to_end(self.spelt_lengths[index])
        if begins_text and self.prefix and text[:1] == b" ":
            return text[1:], np.maximum(spans - 1, 0)
        return text, spans

    def _one_by_one(self, source: bytes, ids: Sequence[int]) -> NDArray[np.int64]:
        """Spans of tokens between which the text or the tokens have spaces that the other has not."""
        found, end = [(0, 0)], 0
        for is_added, run in groupby(ids, self.added.__contains__):
            indices = list(run)
            pieces = [self.pieces[index] for index in indices]
            if not is_added and _is_prefixed(b"".join(pieces), source[end:]):
                pieces[0] = pieces[0][1:]  # some tokenizers put a space before each stretch between added tokens
            for index, piece in zip(indices, pieces, strict=True):
                found.append(self._next(source, index, piece, end=end, place=len(found) - 1))
                end = found[-1][1]
        if (end if self.keeps_spaces else _after_spaces(source, end)) != len(source):
            rest = _shown(source[end : end + 16])
            raise LossyTokenizationError(f"the tokens end at byte {end} of the text, before {rest}: it was left out. {_ADVICE}")
        return np.array(found[1:], np.int64).reshape(-1, 2)

    def _next(self, source: bytes, index: int, piece: bytes, *, end: int, place: int) -> tuple[int, int]:
        """The span of the token that comes after byte ``end``."""
        added, begin = self.added.get(index), end
        if not source.startswith(piece, begin) and (not self.keeps_spaces or (added is not None and added.lstrip)):
            begin = _after_spaces(source, end)
        if not source.startswith(piece, begin):
            raise self._difference(source, index, piece, begin=begin, place=place)
        after = begin + len(piece)
        if added is None or not self.keeps_spaces:
            return begin, after
        return end, _after_spaces(source, after) if added.rstrip else after

    def _difference(self, source: bytes, index: int, piece: bytes, *, begin: int, place: int) -> LossyTokenizationError:
        """One line: which token is another text than what is written, where, and as far as it shows, why."""
        offset = begin + _common(piece, source[begin:])
        rest = source[offset:]
        reason = "the tokenizer changed the text, or left out a part of it"
        if index in self.unknown:
            reason = "the tokenizer has no token for it"
        elif rest.startswith("▁".encode()) and b" " in piece:
            reason = "the tokenizer reads a literal '▁' as a space"
        elif len(piece) == 1 and (found := _BYTE.match(rest)):
            reason = f"the tokenizer reads a literal {_shown(found[0])} as one byte"
        where = f"token {place} ({_shown(piece)}) is not what the text has at byte {offset} ({_shown(rest[:16])})"
        return LossyTokenizationError(f"{where}: {reason}. {_ADVICE}")


_ADVICE = "Leave this text out, or write it as the tokenizer reads it"
_tables: WeakKeyDictionary[Any, _Table] = WeakKeyDictionary()


def _table(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int] = ()) -> _Table:
    """The tokenizer's table, made anew for tokens that were added since (to count all tokens each time would take long)."""
    table = _tables.get(tokenizer)
    if table is None or (max(ids, default=0) >= len(table.pieces) and len(tokenizer) > len(table.pieces)):
        table = _tables[tokenizer] = _Table.of(tokenizer)
    return table


def _lengths(texts: list[bytes]) -> NDArray[np.int64]:
    return np.array([len(text) for text in texts], np.int64)


def _between_spaces(source: bytes, joined: bytes, lengths: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """Spans of tokens that spell the text without its spaces; None if they do not, or if a space is inside of one."""
    kept = np.flatnonzero(~_is_space(source))
    if np.frombuffer(source, np.uint8)[kept].tobytes() != joined:
        return None
    after = lengths.cumsum()
    ends = np.concatenate([[0], kept + 1])[after]
    starts = ends - lengths
    firsts = np.append(kept, 0)[after - lengths]
    return np.stack([starts, ends], 1) if ((firsts == starts) | (lengths == 0)).all() else None


def _is_space(source: bytes) -> NDArray[np.bool_]:
    """[len(source)]: which bytes are of white space."""
    found = _ASCII_SPACES[np.frombuffer(source, np.uint8)]
    if not source.isascii():
        for match in _SPACES.finditer(source):
            found[match.start() : match.end()] = True
    return found


def _after_spaces(source: bytes, position: int) -> int:
    match = _SPACES.match(source, position)
    return position if match is None else match.end()


def _is_prefixed(joined: bytes, rest: bytes) -> bool:
    """Whether a space that is not in the text was put before these tokens: without it more of them is in the text."""
    if joined[:1] != b" " or rest.startswith(joined):
        return False
    return rest.startswith(joined[1:]) or _common(joined[1:], rest) > _common(joined, rest)


def _common(a: bytes, b: bytes) -> int:
    """How many bytes two texts begin with alike."""
    size = min(len(a), len(b))
    differs = np.frombuffer(a, np.uint8, size) != np.frombuffer(b, np.uint8, size)
    return int(differs.argmax()) if differs.any() else size


def _shown(text: bytes) -> str:
    return repr(text.decode(errors="backslashreplace"))

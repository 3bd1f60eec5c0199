"""Embeddings for another tokenizer: which new token is which old one, and of which old ones the others are made."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from tokenizers import Tokenizer
from torch import Tensor

from kdlib.tokenizers.identity import same_tokenizer
from kdlib.tokenizers.initial import Method, Plan, Sums, adapted, averages, nothing
from kdlib.tokenizers.pieces import steps, token_bytes
from kdlib.tokenizers.surface import surface_vectors
from kdlib.tokenizers.vocabularies import shared_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# of special tokens, the most telling first: where one token has two, it stands for the first
ROLES = ("eos_token", "bos_token", "unk_token", "sep_token", "cls_token", "mask_token", "pad_token")
_NO_PREFIX: dict[str, dict[str, Any]] = {
    "Prepend": {"prepend": ""},
    "Metaspace": {"prepend_scheme": "never"},
    "ByteLevel": {"add_prefix_space": False},
}


class Speller:
    """How one tokenizer spells bytes.

    bytes: of each token. special: ids that are no text. holders: {bytes: ids}.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.bytes = token_bytes(tokenizer)
        special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = special | ({tokenizer.unk_token_id} - {None})
        self.holders: dict[bytes, list[int]] = defaultdict(list)
        for index, content in enumerate(self.bytes):
            if content:
                self.holders[content].append(index)
        self._tokenizer = tokenizer
        self._backend = _without_prefix(tokenizer.backend_tokenizer) if tokenizer.is_fast else None
        self._longest = max(map(len, self.holders), default=0)

    def pieces(self, texts: Sequence[bytes]) -> list[list[int]]:
        """The text tokens that spell each of ``texts`` as it stands within a text, without a space put before it.

        As the tokenizer reads it; where that spells other bytes (it normalises, or they are no whole characters) the longest
        tokens from left to right; [] where no tokens spell it.
        """
        decoded = [text.decode(errors="replace") for text in texts]
        return [
            ids if self._spells(ids, text) else self._greedy(text)
            for ids, text in zip(self._encoded(decoded), texts, strict=True)
        ]

    @property
    def lengths(self) -> Tensor:
        """[V] float32, in bytes."""
        return torch.tensor([float(len(content)) for content in self.bytes])

    @property
    def vectors(self) -> Tensor:
        """[V, 256] ``surface_vectors``."""
        return surface_vectors(self._tokenizer, vocab_size=len(self.bytes))

    def used(self, content: bytes) -> int:
        """The token that a text with these bytes becomes, of those that have them."""
        text = [index for index in self.holders[content] if index not in self.special]
        [ids] = self._encoded([content.decode(errors="replace")]) if len(text) > 1 else [[]]
        return ids[0] if len(ids) == 1 and ids[0] in text else (text or self.holders[content])[0]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        if self._backend is None:
            return [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def _spells(self, ids: Iterable[int], text: bytes) -> bool:
        ids = list(ids)
        return self.special.isdisjoint(ids) and b"".join(self.bytes[index] for index in ids) == text

    def _greedy(self, text: bytes) -> list[int]:
        found, start = [], 0
        while start < len(text):
            ends = range(min(start + self._longest, len(text)), start, -1)
            fits = (index for end in ends for index in self.holders.get(text[start:end], ()) if index not in self.special)
            if (token := next(fits, None)) is None:
                return []
            found.append(self.used(self.bytes[token]))
            start += len(self.bytes[token])
        return found


def transplanted_rows(
    matrix: Tensor, old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, *, method: Method = "fvt", seed: int = 0
) -> Tensor:
    """Rows [V', D] for the tokens of ``new`` from those of ``old``, [V, D] (padding behind them is left out).

    A token with the same bytes, or of the same role, has the same row; the others are made by ``method``: of the old tokens
    that spell them (``initial.averages``, ``initial.adapted``), or as the mean of all rows. What none spell is that mean with
    normal noise of the rows' standard deviation, of ``seed``. Raises ValueError for tokenizers whose bytes are unknown.
    """
    return transplant_plan(old, new, method=method).rows(matrix, seed=seed)


def transplant_plan(
    old: PreTrainedTokenizerBase,
    new: PreTrainedTokenizerBase,
    *,
    method: Method = "fvt",
    roles: Mapping[int, int] | None = None,
) -> Plan:
    """What the rows of ``new`` are made of; ``roles``: {new id: old id} of more special tokens that mean the same."""
    if method not in get_args(Method):
        raise ValueError(f"method is {', '.join(get_args(Method))}, not {method!r}")
    theirs, ours = Speller(old), Speller(new)
    tokens = torch.tensor([index for index, content in enumerate(theirs.bytes) if content], dtype=torch.int64)
    if same_tokenizer(old, new):
        every = torch.arange(len(ours.bytes))
        return Plan(copied=every, sums=nothing(), drawn=torch.zeros(len(every), dtype=torch.bool), old=tokens)
    shared = shared_tokens(new, old, sizes=(len(ours.bytes), len(theirs.bytes)))
    found = dict(zip(*(ids.tolist() for ids in shared), strict=True))
    found |= role_tokens(old, new, found=found, more=roles or {})
    copied = torch.full((len(ours.bytes),), -1).index_copy_(0, _ids(found), _ids(found.values()))
    open_ids = [index for index in _reachable(ours) if index not in found]
    sums = _sums(open_ids, theirs, ours, method=method)
    drawn = torch.zeros(len(copied), dtype=torch.bool)
    if method != "mean":
        drawn[_ids(open_ids)] = True
        drawn[sums[0]] = False
    return Plan(copied=copied, sums=sums, drawn=drawn, old=tokens)


def role_tokens(
    old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, *, found: Mapping[int, int], more: Mapping[int, int]
) -> dict[int, int]:
    """{new id: old id} of special tokens that have the same role, and of ``more``, where neither is in ``found``.

    An old token goes to one new one: a row of its own for padding is no copy of the end of text.
    """
    pairs = [(getattr(new, f"{role}_id"), getattr(old, f"{role}_id")) for role in ROLES]
    made: dict[int, int] = {}
    for ours, theirs in (*more.items(), *pairs):
        free = ours not in found and ours not in made and theirs not in {*found.values(), *made.values()}
        if ours is not None and theirs is not None and free:
            made[ours] = theirs
    return made


def _sums(ids: list[int], old: Speller, new: Speller, *, method: Method) -> Sums:
    """What the new tokens ``ids`` are made of."""
    if method == "mean" or not ids:
        return nothing()
    pieces = list(zip(ids, old.pieces([new.bytes[index] for index in ids]), strict=True))
    if method == "fvt":
        return averages(pieces)
    text = torch.tensor([bool(content) and index not in old.special for index, content in enumerate(old.bytes)])
    return adapted(
        pieces,
        lengths=(new.lengths, old.lengths),
        vectors=(new.vectors, old.vectors),
        text=text,
    )


def _reachable(speller: Speller) -> list[int]:
    """The ids that a text can become: of text tokens with the same bytes one, and no ids without a token."""
    found = {
        index
        for content, ids in speller.holders.items()
        for index in (*(i for i in ids if i in speller.special), speller.used(content))
    }
    return sorted(found)


def _without_prefix(backend: Tokenizer) -> Tokenizer:
    """A copy that puts no space before a text, and nothing around it."""
    content = json.loads(backend.to_str()) | {"post_processor": None, "truncation": None, "padding": None}
    for step in (*steps(content["normalizer"], "normalizers"), *steps(content["pre_tokenizer"], "pretokenizers")):
        step |= _NO_PREFIX.get(step["type"], {})
    return Tokenizer.from_str(json.dumps(content))


def _ids(ids: Iterable[int]) -> Tensor:
    return torch.tensor(list(ids), dtype=torch.int64)

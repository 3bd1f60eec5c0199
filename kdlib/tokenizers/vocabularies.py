"""What two vocabularies have in common, and which tokens of one begin a word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdlib.tokenizers.pieces import token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def shared_tokens(
    a: PreTrainedTokenizerBase,
    b: PreTrainedTokenizerBase,
    *,
    sizes: tuple[int, int],
    roles: Sequence[tuple[int | None, int | None]] = (),
) -> tuple[Tensor, Tensor]:
    """Ids ([M], [M]) of the tokens that are one in both, below ``sizes``, increasing in ``a``; each token once at most.

    First come the pairs of ``roles``, such as the tokens that end a turn, where neither is None. Then text tokens that spell
    the same bytes (of several, the one that is not a byte fallback, then the lowest id), added tokens of equal content, special
    or not, and the beginning-of-sequence and the end-of-sequence tokens that are left, however they are written. Never shared
    are tokens for unknown text, ids without a token, and a special token with text of the vocabulary that is written like it.
    Raises ValueError for a tokenizer whose bytes are not known (``token_bytes``).
    """
    (text_a, added_a), (text_b, added_b) = (_tokens(one, size) for one, size in ((a, sizes[0]), (b, sizes[1])))
    own_roles = ((a.bos_token_id, b.bos_token_id), (a.eos_token_id, b.eos_token_id))
    found: dict[int, int] = {}
    taken: set[int] = set()
    for i, j in (*roles, *_equal(text_a, text_b), *_equal(added_a, added_b), *own_roles):
        if i is None or j is None or i >= sizes[0] or j >= sizes[1] or i in found or j in taken:
            continue
        found[i] = j
        taken.add(j)
    ids = torch.tensor(sorted(found.items()), dtype=torch.long).view(-1, 2)
    return ids[:, 0].contiguous(), ids[:, 1].contiguous()


def space_tokens(tokenizer: PreTrainedTokenizerBase, *, size: int) -> Tensor:
    """[size] bool: the tokens whose first byte is ASCII white space, and special tokens; with these a word is over.

    Ids without a token are false. Of WordPiece, whose tokens hold no spaces, only special tokens are.
    Raises ValueError for a tokenizer whose bytes are not known (``token_bytes``).
    """
    spelled = token_bytes(tokenizer, vocab_size=size)
    special = _special(tokenizer)
    return torch.tensor([index in special or spelled[index][:1].isspace() for index in range(size)])


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def _tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> tuple[dict[bytes, int], dict[bytes, int]]:
    """{bytes: id} of text, and of the tokens that were added, special or not."""
    spelled, special, added = token_bytes(tokenizer, vocab_size=size), _special(tokenizer), tokenizer.added_tokens_decoder
    unknown = tokenizer.unk_token_id
    if unknown in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        unknown = None  # GPT-2's end of text: it stands for no unknown text, as every byte has a token
    usable = [index for index, text in enumerate(spelled) if text and index != unknown]
    single = [index for index in usable if len(spelled[index]) == 1]
    pieces = tokenizer.convert_ids_to_tokens(single)
    fallback = {index for index, piece in zip(single, pieces, strict=True) if piece.startswith("<0x")}
    text = sorted((index for index in usable if index not in special), key=lambda index: (index in fallback, index))
    return _first_of(text, spelled), _first_of((index for index in usable if index in added), spelled)


def _first_of(ids: Iterable[int], spelled: Sequence[bytes]) -> dict[bytes, int]:
    found: dict[bytes, int] = {}
    for index in ids:
        found.setdefault(spelled[index], index)
    return found


def _equal(a: dict[bytes, int], b: dict[bytes, int]) -> Iterable[tuple[int, int]]:
    return ((index, b[text]) for text, index in a.items() if text in b)

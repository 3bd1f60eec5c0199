"""Two tokenizers of the same text: which of their tokens are the same, so that one's model can draft for the other's."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

LEAST_SHARED = 0.01
"""Share of the target's tokens below which drafting is refused."""


class SharedVocabulary:
    """The tokens that stand for the same bytes in both tokenizers; special tokens are shared by name, bos and eos by role.

    ``sizes``: entries of the target's and of the draft's logits. A token of the target's that the draft does not have is shown
    to it as its unk, or else its eos. Raises ValueError when nearly nothing is shared, or the draft has neither unk nor eos.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, draft_tokenizer: PreTrainedTokenizerBase, *, sizes: tuple[int, int]
    ) -> None:
        unknown = draft_tokenizer.eos_token_id if draft_tokenizer.unk_token_id is None else draft_tokenizer.unk_token_id
        if unknown is None:
            raise ValueError("the draft's tokenizer has neither an unk nor an eos token to show it tokens it does not have")
        pairs = _shared(tokenizer, draft_tokenizer, sizes=sizes)
        if len(pairs) < max(2, LEAST_SHARED * sizes[0]):
            raise ValueError(
                f"the tokenizers share {len(pairs)} of the target's {sizes[0]} tokens: "
                "take a draft whose tokenizer splits text in a like way"
            )
        self.size = sizes[0]
        self.target_ids, self.draft_ids = torch.tensor(sorted(pairs.items())).unbind(-1)
        self._to_draft = torch.full((sizes[0],), unknown).index_copy(0, self.target_ids, self.draft_ids)

    def to(self, device: torch.device) -> SharedVocabulary:
        """Moves the tables in place."""
        self.target_ids, self.draft_ids = self.target_ids.to(device), self.draft_ids.to(device)
        self._to_draft = self._to_draft.to(device)
        return self

    def to_draft(self, ids: Tensor) -> Tensor:
        """The target's token ids as the draft's, of any shape."""
        return self._to_draft[ids]

    def to_target(self, logits: Tensor) -> Tensor:
        """The draft's logits [b, V draft] in the target's vocabulary [b, V], -inf for tokens the draft does not have."""
        mapped = logits.new_full((*logits.shape[:-1], self.size), -torch.inf)
        return mapped.index_copy(-1, self.target_ids, logits[..., self.draft_ids])


def _shared(
    tokenizer: PreTrainedTokenizerBase, draft_tokenizer: PreTrainedTokenizerBase, *, sizes: tuple[int, int]
) -> dict[int, int]:
    """{target id: draft id}; each draft token once, as two target tokens of one draft token would share its probability."""
    ours, theirs = _contents(tokenizer, size=sizes[0]), _contents(draft_tokenizer, size=sizes[1])
    pairs = {ours[content]: theirs[content] for content in ours.keys() & theirs.keys()}
    for a, b in (
        (tokenizer.bos_token_id, draft_tokenizer.bos_token_id),
        (tokenizer.eos_token_id, draft_tokenizer.eos_token_id),
    ):
        if a is not None and b is not None and a not in pairs and b not in pairs.values():
            pairs[a] = b
    return pairs


def _contents(tokenizer: PreTrainedTokenizerBase, *, size: int) -> dict[tuple[bool, bytes], int]:
    """{(added token or not, the bytes it stands for): id} of the ids below ``size``; the lowest id of the same content."""
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    letters = _byte_letters()
    byte_level = letters.keys() <= vocabulary.keys()
    found: dict[tuple[bool, bytes], int] = {}
    for token, index in sorted(vocabulary.items(), key=lambda item: item[1]):
        if index < size:
            content = token.encode() if token in added else _token_bytes(token, letters if byte_level else None)
            found.setdefault((token in added, content), index)
    return found


def _token_bytes(token: str, letters: dict[str, int] | None) -> bytes:
    """Byte-level entries are spelled in 256 ``letters``; SentencePiece writes a space as U+2581 and a lone byte as <0x0A>."""
    if letters is not None and all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    lone = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
    return bytes([int(lone[1], 16)]) if lone else token.replace("\u2581", " ").encode()


def _byte_letters() -> dict[str, int]:
    """The byte that each letter of byte-level BPE stands for: printable Latin-1 itself, the others from U+0100 on (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}

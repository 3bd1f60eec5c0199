"""What each token of one vocabulary becomes in another: its namesake, or the tokens that its text is split into."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdlib.tokenizers.pieces import special_tokens, token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEADS = ("\n", ".")  # what is put before a text where a tokenizer would put a space of its own


def token_projection(
    student_tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    *,
    sizes: tuple[int, int],
    width: int = 4,
    decay: float = 0.1,
    roles: Sequence[tuple[int | None, int | None]] = (),
) -> tuple[Tensor, Tensor]:
    """(ids [V, K] int64, weights [V, K] float32): the teacher's tokens that each token of the student becomes, K = ``width``.

    A token that the teacher has too, byte for byte, becomes that one. Others become the pieces 0..K-1 that the teacher's
    tokenizer splits their text into, with weights decay^i normalised to sum 1 (X-Token, arXiv 2605.21699: 0.9 * 0.1^i); decay
    0 leaves the first piece alone, the one with which the teacher would go on. Special tokens become those of the same text,
    else the one of the same role (bos, eos). All weights are 0 for ids without a token, special tokens without a counterpart,
    parts of characters that the teacher lacks, and texts that its tokenizer changes (checked by the bytes of the pieces).

    ``sizes``: V and V', the rows of both heads. ``roles``: pairs of tokens that do the same, such as those that end a turn,
    which come before all others; left out where one is None. Raises ValueError for ``width`` and ``decay`` out of range and
    for tokenizers whose bytes are not known (``token_bytes``).
    """
    if width < 1 or not 0.0 <= decay <= 1.0:
        raise ValueError(f"token_projection needs width >= 1 and decay between 0 and 1, not {width} and {decay}")
    ours, theirs = (token_bytes(t, vocab_size=V) for t, V in zip((student_tokenizer, teacher_tokenizer), sizes, strict=True))
    special, known = special_tokens(student_tokenizer), special_tokens(teacher_tokenizer)
    becomes = _of_specials(student_tokenizer, teacher_tokenizer, special=special, known=known, size=sizes[1])
    texts = {index: text for index, text in enumerate(ours) if text and index not in special}
    becomes |= _of_texts(texts, theirs, teacher_tokenizer, known=known)
    becomes |= {i: [j] for i, j in roles if i is not None and j is not None and j < sizes[1]}
    pieces = [becomes.get(index, []) for index in range(sizes[0])]
    ids = torch.tensor([(found + [0] * width)[:width] for found in pieces])
    counts = torch.tensor([min(len(found), width) for found in pieces])
    shares = torch.tensor([[decay**i if i < count else 0.0 for i in range(width)] for count in range(width + 1)])
    return ids, torch.nn.functional.normalize(shares, p=1.0, dim=-1)[counts]


def _of_specials(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    *,
    special: Mapping[int, str],
    known: Mapping[int, str],
    size: int,
) -> dict[int, list[int]]:
    """What the student's special tokens become, of the teacher's first ``size`` tokens."""
    roles = {student.bos_token_id: teacher.bos_token_id, student.eos_token_id: teacher.eos_token_id}
    named = {content: index for index, content in known.items()}
    found = {index: named.get(content, roles.get(index)) for index, content in special.items()}
    return {index: [theirs] for index, theirs in found.items() if theirs is not None and theirs < size}


def _of_texts(
    texts: Mapping[int, bytes],
    theirs: Sequence[bytes],
    tokenizer: PreTrainedTokenizerBase,
    *,
    known: Mapping[int, str],
) -> dict[int, list[int]]:
    """What the student's tokens of these bytes become."""
    # of tokens that spell the same, <0x41> and A, the single bytes come first and are not what text is split into
    exact = {text: index for index, text in enumerate(theirs) if index not in known}
    split = _split({index: text for index, text in texts.items() if _is_text(text)}, theirs, tokenizer)
    found: dict[int, list[int]] = {}
    for index, text in texts.items():
        pieces = [] if known.keys() & split.get(index, ()) else split.get(index, [])
        if text in exact and len(pieces) != 1:
            pieces = [exact[text]]
        if pieces:
            found[index] = pieces
    return found


def _is_text(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def _split(texts: Mapping[int, bytes], theirs: Sequence[bytes], tokenizer: PreTrainedTokenizerBase) -> dict[int, list[int]]:
    """The pieces that each text is split into within a longer one; those that do not spell the text are left out."""
    lead = _lead(tokenizer, theirs)
    written = [lead + text.decode() for text in texts.values()]
    encoded = tokenizer(written, add_special_tokens=False)["input_ids"] if written else []
    split = {index: _without(lead.encode(), pieces, theirs) for index, pieces in zip(texts, encoded, strict=True)}
    return {index: pieces for index, pieces in split.items() if pieces and _joined(pieces, theirs) == texts[index]}


def _lead(tokenizer: PreTrainedTokenizerBase, theirs: Sequence[bytes]) -> str:
    """What is put before a text, so that the space which the tokenizer adds in front is not of the text; often nothing."""
    if _joined(_encoded(tokenizer, "a"), theirs) != b" a":
        return ""
    known = (lead for lead in LEADS if _joined(_encoded(tokenizer, lead), theirs) == b" " + lead.encode())
    return next(known, "")


def _without(lead: bytes, pieces: list[int], theirs: Sequence[bytes]) -> list[int]:
    """The pieces after those that spell ``lead`` and a space before it; none where one reaches beyond it."""
    if not lead:
        return pieces
    for count in range(1, len(pieces)):
        if _joined(pieces[:count], theirs) in (lead, b" " + lead):
            return pieces[count:]
    return []


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _joined(pieces: Sequence[int], theirs: Sequence[bytes]) -> bytes | None:
    """The bytes of the pieces; None where one is beyond the head."""
    return None if any(index >= len(theirs) for index in pieces) else b"".join(theirs[index] for index in pieces)

"""The bytes that a tokenizer's tokens stand for, read from how their pieces are written; nothing is decoded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
# What turns pieces into text, other than these, would give them a meaning that is not read here.
_DECODERS = {"BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"}


def gpt2_alphabet() -> dict[str, int]:
    """{character: byte} of byte-level BPE: printable Latin-1 stands for itself, the other bytes for U+0100 onwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """How a tokenizer writes bytes as pieces.

    alphabet: {character: byte} where each character is one byte. spaces: strings that are written for a space, ``▁``.
    byte_fallback: a piece ``<0xNN>`` is one byte. prefix, suffix: marks of a piece within a word (``##``) and of a word's last
    piece (``</w>``), which are no text.
    """

    alphabet: Mapping[str, int] = field(default_factory=dict)
    spaces: frozenset[str] = frozenset()
    byte_fallback: bool = False
    prefix: str = ""
    suffix: str = ""

    def read(self, piece: str) -> bytes:
        """The bytes of one piece. A piece that is a mark and nothing else is text."""
        if piece != self.prefix:
            piece = piece.removeprefix(self.prefix)
        if piece != self.suffix:
            piece = piece.removesuffix(self.suffix)
        if self.alphabet:
            # no text is split into a piece with another character: it is in the vocabulary as it is written
            known = self.alphabet.keys() >= set(piece)
            return bytes(map(self.alphabet.__getitem__, piece)) if known else piece.encode()
        if self.byte_fallback and (found := _FALLBACK.fullmatch(piece)):
            return bytes.fromhex(found[1])
        for mark in self.spaces:
            piece = piece.replace(mark, " ")
        return piece.encode()


def token_bytes(tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None) -> list[bytes]:
    """The UTF-8 bytes of each token, index = id, [vocab_size]; b"" for ids without a token. By default up to the last token.

    Joined, those of an encoded text are the text's bytes, where nothing normalises it, with the space that some tokenizers put
    before it. They need not be whole characters. Byte-level BPE, Metaspace and Llama-2 style (``▁`` is a space, a literal one
    in the text too; ``<0xNN>`` is one byte), WordPiece and other marks of words (spaces between words are in no token), and
    pieces without marks; Python tokenizers of SentencePiece, BERT, ByT5 and those with GPT-2's ``byte_decoder``. Special and
    added tokens are their content as it is written; an added one, not special, that the model has too is read as the model's.

    Raises ValueError for a tokenizer whose pieces are written in another way.
    """
    from transformers.tokenization_mistral_common import MistralCommonBackend

    if isinstance(tokenizer, MistralCommonBackend):
        raise _unknown(tokenizer, "mistral-common's own: load it with AutoTokenizer.from_pretrained(..., mistral_format=False)")
    spelling, pieces = _fast(tokenizer) if tokenizer.is_fast else _python(tokenizer)
    found = {index: spelling.read(piece) for index, piece in pieces.items()}
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special or index not in pieces:
            found[index] = token.content.encode()
    return [found.get(index, b"") for index in range(max(found, default=-1) + 1 if vocab_size is None else vocab_size)]


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """{id: content} of the tokens that are no text."""
    marked = {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marked | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def unknown_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of the unknown token, the tokenizer's and its model's; none where the end of a text stands for it (GPT-2)."""
    from tokenizers.models import Unigram

    found = {tokenizer.unk_token_id}
    if tokenizer.is_fast:
        model = tokenizer.backend_tokenizer.model
        if isinstance(model, Unigram):
            found.add(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["unk_id"])
        elif model.unk_token:
            found.add(model.token_to_id(model.unk_token))
    return frozenset(found - {None, tokenizer.bos_token_id, tokenizer.eos_token_id})


def written(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """How ``text`` is written before the model splits it, words end to end; of a Python tokenizer its known pieces."""
    if not tokenizer.is_fast:
        known, unknown = token_bytes(tokenizer), unknown_ids(tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return b"".join(known[index] for index in ids if index not in unknown).decode(errors="replace")
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    return text if backend.pre_tokenizer is None else "".join(word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))


def _fast(tokenizer: PreTrainedTokenizerBase) -> tuple[Spelling, dict[int, str]]:
    """How a fast tokenizer writes pieces, and {id: piece} of its model."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model, vocabulary = content["model"], content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        pieces = {index: piece for piece, index in vocabulary.items()}
    else:  # Unigram: [piece, score]
        pieces = {index: piece for index, (piece, _) in enumerate(vocabulary)}
    decoders = list(steps(content["decoder"], "decoders"))
    before = [*steps(content["normalizer"], "normalizers"), *steps(content["pre_tokenizer"], "pretokenizers")]
    kinds = {step["type"] for step in decoders}
    spaces = _spaces(tokenizer, decoders, before)
    byte_level = "ByteLevel" in kinds | {step["type"] for step in before}
    if kinds - _DECODERS or (byte_level and spaces):
        raise _unknown(tokenizer, f"a decoder of {', '.join(sorted(kinds))}" + (" beside ByteLevel" if byte_level else ""))
    return Spelling(
        alphabet=gpt2_alphabet() if byte_level else {},
        spaces=spaces,
        byte_fallback="ByteFallback" in kinds or bool(model.get("byte_fallback")),
        prefix=model.get("continuing_subword_prefix") or "",
        suffix=model.get("end_of_word_suffix") or "",
    ), pieces


def steps(part: dict[str, Any] | None, inside: str) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, however deep its sequences."""
    if part is None:
        return
    if part["type"] != "Sequence":
        yield part
        return
    for step in part[inside]:
        yield from steps(step, inside)


def _spaces(tokenizer: PreTrainedTokenizerBase, decoders: list[dict[str, Any]], before: list[dict[str, Any]]) -> frozenset[str]:
    """What stands for a space: a decoder turns it into one, or it is written for one before the text is split."""
    found = {step["replacement"] for step in (*decoders, *before) if step["type"] == "Metaspace"}
    for step in decoders:
        if step["type"] == "Replace":
            if step["content"] != " " or "String" not in step["pattern"]:
                raise _unknown(tokenizer, f"a decoder that replaces {step['pattern']} by {step['content']!r}")
            found.add(step["pattern"]["String"])
    found |= {step["content"] for step in before if step["type"] == "Replace" and step["pattern"] == {"String": " "}}
    return frozenset(found - {" ", ""})  # "": spaces are left out


def _python(tokenizer: PreTrainedTokenizerBase) -> tuple[Spelling, dict[int, str]]:
    """The same of a Python tokenizer, known by its class or by its table of bytes."""
    from transformers import ByT5Tokenizer
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    if isinstance(tokenizer, SentencePieceBackend):
        model = tokenizer.sp_model
        fallback = any(model.IsByte(index) for index in range(model.GetPieceSize()))
        return Spelling(spaces=frozenset("▁"), byte_fallback=fallback), _model_pieces(tokenizer)
    if isinstance(tokenizer, ByT5Tokenizer):
        return Spelling(alphabet={chr(byte): byte for byte in range(256)}), _model_pieces(tokenizer)
    if isinstance(tokenizer, BertTokenizerLegacy):
        return Spelling(prefix="##"), _model_pieces(tokenizer)
    if "byte_decoder" in vars(tokenizer):  # as GPT-2's had it, which tokenizers outside transformers copy
        return Spelling(alphabet=tokenizer.byte_decoder), _model_pieces(tokenizer)
    raise _unknown(tokenizer, "a Python tokenizer of its own")


def _model_pieces(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """{id: piece} without the added tokens that lie beyond a Python tokenizer's own vocabulary."""
    added = tokenizer.added_tokens_decoder
    pieces = ((index, piece) for piece, index in tokenizer.get_vocab().items())
    return {index: piece for index, piece in pieces if index < tokenizer.vocab_size or index not in added}


def _unknown(tokenizer: PreTrainedTokenizerBase, what: str) -> ValueError:
    return ValueError(
        f"the bytes of the tokens of {type(tokenizer).__name__} are not known ({what}): byte-level BPE, SentencePiece and "
        "Llama-2 style (▁, <0xNN>), WordPiece and plain pieces are read"
    )

"""Tokenizers of all families: trained here in moments, and the real ones that mistral-common ships."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from tests.tiny import tiny_tokenizer

GSM8K = Path(__file__).parents[2] / "../shared/data/gsm8k/train.jsonl"
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
CORPUS = [
    "Natalia sold 48 clips in April, and half as many in May: 48/2 = 24. How many did she sell in all? 48 + 24 = 72.",
    "The café's naïve owner paid $1,234.50 for 17 boxes of tea.\n\nHe sold them for $2,000 — a profit of 62%!",
    "def area(radius):\n    return 3.14159 * radius ** 2  # in square metres\n",
    "東京は日本の首都です。人口は約1400万人です。",
    "Кошка сидит на окне и смотрит на птиц.",
] * 4
TEXTS = [
    *CORPUS[:5],
    "",
    " ",
    "  two spaces before, two behind  ",
    "tab\tand\r\nlines\n\n\nand a NUL \x00 character",
    "emoji 👩‍👧‍👦 and a flag 🇫🇷, a ligature ﬁ, NFC é and NFD e\u0301",
    "no-break\u00a0space, ideographic\u3000space, thin\u2009space",
    "a literal ▁ and <0x41> and </s> and <unk> and ##s and Ġ",
    "x" * 40,
]


def fast(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def byte_level(*, digits: bool = False, vocab_size: int = 500, **parts: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with ``</s>``; ``digits``: each digit is a token."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return fast(tokenizer, eos_token="</s>")


def unigram(*, byte_fallback: bool = True, scheme: str = "always", **parts: Any) -> PreTrainedTokenizerFast:
    """Unigram with Metaspace; a space is put before texts without one."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocabulary = [tuple(entry) for entry in json.loads(tokenizer.to_str())["model"]["vocab"]]
    vocabulary += [(piece, -30.0) for piece in FALLBACK] if byte_fallback else []
    tokenizer.model = models.Unigram(vocabulary, unk_id=0, byte_fallback=byte_fallback)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return fast(tokenizer, unk_token="<unk>", eos_token="</s>")


def llama2(*, byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    """BPE whose normalizer puts ``▁`` before each stretch of text and for each space, as Llama 2's."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *FALLBACK]
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=600, special_tokens=special, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    model = models.BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return fast(tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def wordpiece(*, normalizer: normalizers.Normalizer | None = None) -> PreTrainedTokenizerFast:
    """WordPiece split at spaces, which lie in no token."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return fast(tokenizer, unk_token="[UNK]", sep_token="[SEP]")


def bytewise() -> PreTrainedTokenizerFast:
    return byte_level(vocab_size=257)


def sentencepiece32k() -> PreTrainedTokenizerFast:
    """Mistral's SentencePiece model of 32,768 tokens, by transformers' own conversion."""
    with TemporaryDirectory() as folder:
        shutil.copy(shipped("mistral_instruct_tokenizer_240323.model.v3"), Path(folder) / "tokenizer.model")
        return LlamaTokenizer.from_pretrained(folder)


def tekken() -> PreTrainedTokenizerFast:
    """Mistral's Tekken of 131,072 tokens, by transformers' own conversion."""
    from transformers.integrations.mistral import convert_tekken_tokenizer

    return convert_tekken_tokenizer(str(shipped("tekken_240911.json")))


def shipped(name: str) -> Path:
    """A file of mistral-common's; the test is skipped where it is not installed."""
    package = pytest.importorskip("mistral_common", reason="mistral-common is not installed")
    return Path(package.__file__).parent / "data" / name


def real_texts(count: int) -> list[str]:
    """Questions and answers of GSM8K; the test is skipped without them."""
    if not GSM8K.is_file():
        pytest.skip(f"needs the rows in {GSM8K}")
    lines = GSM8K.read_text(encoding="utf-8").splitlines()[:count]
    return [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]


LOSSLESS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level": byte_level,
    "digits": partial(byte_level, digits=True),
    "tiny": tiny_tokenizer,
    "bytes": bytewise,
    "unigram": unigram,
    "llama2": llama2,
    "wordpiece": wordpiece,
    "sentencepiece32k": sentencepiece32k,
    "tekken": tekken,
}
CHANGING: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level NFC": partial(byte_level, normalizer=normalizers.NFC()),
    "byte-level prefix": partial(byte_level, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "byte-level lowercase": partial(byte_level, normalizer=normalizers.Lowercase()),
    "unigram NFKC": partial(unigram, normalizer=normalizers.NFKC()),
    "unigram stripped": partial(unigram, normalizer=normalizers.Strip()),
    "unigram first": partial(unigram, scheme="first"),
    "unigram never": partial(unigram, scheme="never"),
    "unigram without bytes": partial(unigram, byte_fallback=False),
    "llama2 without bytes": partial(llama2, byte_fallback=False),
    "wordpiece of BERT": partial(wordpiece, normalizer=normalizers.BertNormalizer()),
    "wordpiece without accents": partial(
        wordpiece, normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])
    ),
}


@cache
def family(name: str) -> PreTrainedTokenizerFast:
    """The tokenizer of that name, made once."""
    return (LOSSLESS | CHANGING)[name]()


def with_added(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Tokens added to it as chat models have them: one that takes the spaces on its sides, one that is no special token."""
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|user|>", lstrip=True, rstrip=True, special=True)]}
    )
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer

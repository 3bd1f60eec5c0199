"""Token vectors of surface form."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kdlib.tokenizers import surface_vectors
from kdlib.tokenizers.pieces import token_bytes
from tests.tiny import tiny_tokenizer


def of_words(*words: str, metaspace: bool = False, special: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """One token for each word, a space written as ``▁`` or as it is."""
    written = [word.replace(" ", "▁") if metaspace else word for word in words]
    tokenizer = Tokenizer(models.WordLevel(vocab={word: index for index, word in enumerate(written)}, unk_token=written[0]))
    if metaspace:
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def vectors(*words: str, width: int = 256, **options: object) -> Tensor:
    tokenizer = of_words(*words, **options)
    return surface_vectors(tokenizer, vocab_size=len(tokenizer), width=width)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=-1))


def plain(text: bytes, *, width: int) -> Tensor:
    """The same counts one by one: bytes and boundary are digits of base 257, shorter n-grams come before longer ones."""
    units = [256, *text, 256]
    grams = [units[i : i + n] for n in (1, 2, 3) for i in range(len(units) - n + 1)]
    found = torch.zeros(width)
    for gram in grams:
        if gram == [256]:
            continue
        number = sum(257**n for n in range(1, len(gram)))
        for unit, power in zip(reversed(gram), range(3), strict=False):
            number += unit * 257**power
        found[xxhash.xxh64_intdigest(number.to_bytes(8, "little")) % width] += 1
    return found


@given(words=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=6, unique=True), width=st.integers(1, 300))
@settings(deadline=None, max_examples=40)
def test_counts_of_hashed_ngrams(words: list[str], width: int) -> None:
    found = vectors(*words, width=width)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack([plain(word.encode(), width=width) for word in words]), rtol=0, atol=0)


def test_columns_are_those_of_every_machine() -> None:
    found = vectors("ab", width=64)[0].nonzero().flatten().tolist()
    assert found == [0, 28, 29, 41, 53, 61]  # a change of these makes written vectors those of other n-grams


def test_equal_texts_of_two_tokenizers_have_equal_vectors() -> None:
    byte_level = tiny_tokenizer()
    known = token_bytes(byte_level)
    texts = [text for text in (" the", " sky", "are", " ", "t") if text.encode() in known]
    assert " the" in texts
    ours = surface_vectors(byte_level, vocab_size=len(byte_level))[[known.index(text.encode()) for text in texts]]
    for theirs in (vectors(*texts, metaspace=True), vectors(*texts)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_words_are_near_what_they_look_like() -> None:
    cat, spaced, cats, xyz, act, scat = vectors("cat", " cat", "cats", "xyz", "tca", "scat")
    assert min(cosine(cat, spaced), cosine(cat, cats)) > 0.6
    assert abs(cosine(cat, xyz)) < 0.3
    assert cosine(cat, act) < 0.6  # the same letters
    assert cosine(cats, cat) > cosine(cats, scat) - 0.1
    assert not torch.equal(cat, spaced)
    prefix, suffix = vectors("reuse", "return", "abuse")[1:] @ vectors("reuse")[0]
    assert min(prefix, suffix) >= 4


def test_special_tokens_are_no_text() -> None:
    special = ("<|user|>", "<|user2|>", "</s>")
    tokenizer = of_words("user", "<s>", special=special)
    found = surface_vectors(tokenizer, vocab_size=len(tokenizer))
    similar = torch.nn.functional.normalize(found, dim=-1)
    similar = similar @ similar.T
    assert (similar[2:] - torch.eye(5)[2:]).abs().max() < 0.35
    assert torch.equal(found[2:].sum(-1), torch.full((3,), 16.0))
    assert (found[2:] > 0).sum(-1).min() >= 12  # nearly as many columns
    named = surface_vectors(of_words("x", special=special[1:]), vocab_size=3)[1:]
    assert torch.equal(named, found[3:])  # its namesake elsewhere
    written = vectors("</s>")[0]
    assert cosine(written, found[4]) < 0.35
    tokenizer.add_tokens(["<think>"])  # added, and text all the same
    assert torch.equal(surface_vectors(tokenizer, vocab_size=6)[5], vectors("<think>")[0])


def test_ids_without_a_token_are_not_alike() -> None:
    found = surface_vectors(of_words("cat"), vocab_size=6)
    assert torch.equal(found[0], vectors("cat")[0])
    similar = torch.nn.functional.normalize(found, dim=-1)
    assert (similar @ similar.T - torch.eye(6)).abs().max() < 0.35
    assert torch.equal(surface_vectors(of_words("dog"), vocab_size=6)[1:], found[1:])


@pytest.mark.parametrize("vocab_size", [1, 2, 5])
def test_the_vocabulary_is_cut(vocab_size: int) -> None:
    tokenizer = of_words("cat", "dog", "</s", special=("</s>",))
    whole = surface_vectors(tokenizer, vocab_size=4)
    found = surface_vectors(tokenizer, vocab_size=vocab_size)
    assert found.shape == (vocab_size, 256)
    assert torch.equal(found[:4], whole[:vocab_size])


def test_tokens_without_any_text() -> None:
    found = surface_vectors(of_words("</s>", special=("</s>",)), vocab_size=1)
    assert Counter(found[0].tolist())[0.0] >= 240

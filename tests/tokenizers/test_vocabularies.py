"""Tokens that two vocabularies share, and tokens that begin a word."""

from __future__ import annotations

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdlib.tokenizers.pieces import token_bytes
from kdlib.tokenizers.vocabularies import shared_tokens, space_tokens
from tests.tiny import tiny_tokenizer


def byte_level(*pieces: str, special: dict[str, str] | None = None, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """The byte-level tokens ``pieces``, then ``added`` ones that are not special, then special ones by role."""
    tokenizer = Tokenizer(models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(text, special=False) for text in added])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (special or {}).values()])
    roles = {role: text for role, text in (special or {}).items() if role.endswith("_token")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def sentence_piece(*pieces: str, special: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """The same in Llama-2 style: ``▁`` is a space, ``<0xNN>`` a byte."""
    model = models.BPE(vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (special or {}).values()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **(special or {}))


def pairs(
    a: PreTrainedTokenizerFast,
    b: PreTrainedTokenizerFast,
    *,
    sizes: tuple[int, int] | None = None,
    roles: tuple[tuple[int | None, int | None], ...] = (),
) -> list[tuple[int, int]]:
    ids_a, ids_b = shared_tokens(a, b, sizes=sizes or (len(a), len(b)), roles=roles)
    assert ids_a.shape == ids_b.shape
    return list(zip(ids_a.tolist(), ids_b.tolist(), strict=True))


def test_a_space_is_written_in_two_ways() -> None:
    a = byte_level("cat", "Ġcat", "Ċ", "Ã", "dog")
    b = sentence_piece("▁cat", "cat", "<0x0A>", "<0xC3>", "Ġcat", "▁dog")
    assert pairs(a, b) == [(0, 1), (1, 0), (2, 2), (3, 3)]
    assert pairs(b, a) == [(0, 1), (1, 0), (2, 2), (3, 3)]


def test_an_ordinary_token_comes_before_a_byte_fallback() -> None:
    a = byte_level("x", "A")
    b = sentence_piece("<0x41>", "B", "A", "<0x42>")
    assert pairs(a, b) == [(1, 2)]
    assert pairs(b, b) == [(1, 1), (2, 2)]  # the second spelling of a byte is not a second token


def test_of_two_equal_tokens_the_lowest_id() -> None:
    a = sentence_piece("▁", "<0x20>", "a", special=None)
    b = byte_level("b", "a", "Ġ")
    assert pairs(a, b) == [(0, 2), (2, 1)]


def test_the_same_tokenizer_is_shared_whole() -> None:
    tokenizer = tiny_tokenizer()
    assert pairs(tokenizer, tokenizer) == [(index, index) for index in range(len(tokenizer))]


def test_special_tokens_by_role() -> None:
    a = byte_level("a", special={"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    b = sentence_piece("a", special={"eos_token": "<end>", "bos_token": "<begin>", "pad_token": "<nothing>"})
    bos, eos = (a.bos_token_id, b.bos_token_id), (a.eos_token_id, b.eos_token_id)
    assert pairs(a, b) == sorted([(0, 0), bos, eos])
    assert pairs(a, byte_level("a", special={"eos_token": "<end>"})) == [(0, 0), (a.eos_token_id, 1)]


def test_equal_content_goes_before_roles_and_given_roles_before_all() -> None:
    """A chat model ends with <|im_end|> what its base ends with <|endoftext|>; both have both."""
    ends = {"eos_token": "<|im_end|>", "other": "<|endoftext|>"}
    a, b = byte_level("a", special=ends), byte_level("a", special={"eos_token": "<|endoftext|>", "other": "<|im_end|>"})
    assert pairs(a, b) == [(0, 0), (1, 2), (2, 1)]
    assert pairs(a, b, roles=((1, 1),)) == [(0, 0), (1, 1)]  # the rest of both is not alike
    assert pairs(a, b, roles=((1, None), (None, 1))) == pairs(a, b)
    assert pairs(a, b, roles=((1, 1), (1, 2), (2, 1))) == [(0, 0), (1, 1)]  # each once


def test_ends_of_turns_are_given() -> None:
    a = byte_level("a", special={"eos_token": "<|endoftext|>", "other": "<|im_end|>"})
    b = sentence_piece("b", "a", special={"eos_token": "<eos>", "unk_token": "<end_of_turn>"})
    assert pairs(a, b) == [(0, 1), (1, 2)]
    assert pairs(a, b, roles=((2, 3),)) == [(0, 1), (1, 2), (2, 3)]


def test_unknown_text_is_nothing_to_share() -> None:
    special = {"unk_token": "<unk>", "eos_token": "</s>"}
    a, b = sentence_piece("a", special=special), sentence_piece("b", "a", special=special)
    assert pairs(a, b) == [(0, 1), (2, 3)]
    gpt2 = {"unk_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    assert pairs(byte_level("a", special=gpt2), byte_level("a", special=gpt2)) == [(0, 0), (1, 1)]


def test_text_that_is_written_like_a_special_token() -> None:
    a, b = byte_level("</s>", "a"), byte_level("a", special={"other": "</s>"})
    assert pairs(a, b) == [(1, 0)]


def test_added_tokens_special_or_not() -> None:
    a, b = byte_level("a", added=("<think>",)), byte_level("a", special={"other": "<think>"})
    assert pairs(a, b) == [(0, 0), (1, 1)]
    assert pairs(b, a) == [(0, 0), (1, 1)]
    assert pairs(a, a) == [(0, 0), (1, 1)]


def test_sizes_cut_and_padding_is_left_out() -> None:
    a, b = byte_level("a", "b", "c"), byte_level("c", "b", "a", special={"eos_token": "x"})
    assert pairs(a, b, sizes=(2, 4)) == [(0, 2), (1, 1)]
    assert pairs(a, b, sizes=(3, 2)) == [(1, 1), (2, 0)]
    assert pairs(a, b, sizes=(128, 64)) == [(0, 2), (1, 1), (2, 0)]
    assert pairs(b, b, sizes=(3, 3), roles=((3, 3),)) == [(0, 0), (1, 1), (2, 2)]
    assert pairs(a, byte_level("d")) == []


def test_large_vocabularies_spell_the_same() -> None:
    a, b = tiny_tokenizer(vocab_size=384), tiny_tokenizer(vocab_size=320)
    found = pairs(a, b)
    spelled_a, spelled_b = token_bytes(a), token_bytes(b)
    assert len(found) == len(set(spelled_a) & set(spelled_b)) >= 256
    assert all(spelled_a[i] == spelled_b[j] for i, j in found)


def test_space_tokens() -> None:
    a = byte_level("cat", "Ġcat", "Ċ", "ĉa", "aĠ", "ĠĠ", "č", special={"eos_token": "</s>"}, added=("<think>", " x"))
    expected = {"Ġcat", "Ċ", "ĉa", "ĠĠ", "č", " x", "</s>"}
    found = space_tokens(a, size=len(a) + 3)
    assert found.shape == (len(a) + 3,)
    assert {a.convert_ids_to_tokens(index) for index in found.nonzero()[:, 0].tolist()} == expected
    b = sentence_piece("▁cat", "cat", "<0x0A>", "<0x20>", "<0x41>", "▁", "\u3000", special={"eos_token": "</s>"})
    assert space_tokens(b, size=len(b)).tolist() == [True, False, True, True, False, True, False, True]
    assert space_tokens(b, size=3).tolist() == [True, False, True]


@pytest.mark.parametrize("size", [1, 300, 1000])
def test_space_tokens_begin_a_word(size: int) -> None:
    tokenizer = tiny_tokenizer()
    special = set(tokenizer.all_special_ids) | {index for index, t in tokenizer.added_tokens_decoder.items() if t.special}
    texts = [tokenizer.decode([index]) if index < len(tokenizer) else "" for index in range(size)]
    expected = [index in special or text.startswith(tuple(" \t\n\r\v\f")) for index, text in enumerate(texts)]
    assert space_tokens(tokenizer, size=size).tolist() == expected

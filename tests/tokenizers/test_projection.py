"""What the tokens of one vocabulary become in another."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdlib.tokenizers.pieces import token_bytes
from kdlib.tokenizers.projection import token_projection
from tests.tiny import tiny_tokenizer
from tests.tokenizers.test_pieces import fast, llama, unigram
from tests.tokenizers.test_surface import of_words

LLAMA = llama()


def becomes(student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, **options: object) -> list[dict[str, float]]:
    """{the teacher's piece: weight} of each token."""
    ids, weights = token_projection(student, teacher, sizes=(len(student), len(teacher)), **options)
    assert ids.dtype == torch.int64 and weights.dtype == torch.float32
    rows = zip(ids.tolist(), weights.tolist(), strict=True)
    return [
        {teacher.convert_ids_to_tokens(index): pytest.approx(w) for index, w in zip(*row, strict=True) if w} for row in rows
    ]


def words(*texts: str, special: Sequence[str] = (), **options: str) -> PreTrainedTokenizerFast:
    tokenizer = of_words(*texts)
    tokenizer.add_tokens([AddedToken(text, special=True) for text in special], special_tokens=True)
    tokenizer.add_special_tokens(dict(options))
    return tokenizer


def test_namesakes_and_pieces() -> None:
    found = becomes(words("cat", " cat", "cats", " s", "xy", "é", "A", "  ", "cat cat"), LLAMA)
    assert found[:2] == [{"cat": 1.0}, {"▁cat": 1.0}]
    assert found[2:4] == [{"cat": 1 / 1.1, "s": 0.1 / 1.1}, {"▁": 1 / 1.1, "s": 0.1 / 1.1}]
    assert found[4:] == [
        {"<0x78>": 1 / 1.1, "<0x79>": 0.1 / 1.1},
        {"é": 1.0},
        {"<0x41>": 1.0},
        {"▁▁": 1.0},
        {"cat": 1 / 1.1, "▁cat": 0.1 / 1.1},
    ]


def test_text_before_single_bytes() -> None:
    """<0x63> and c spell the same; text is split into c."""
    found = becomes(LLAMA, LLAMA)
    index = LLAMA.convert_tokens_to_ids
    assert found[index("<0x63>")] == found[index("c")] == {"c": 1.0}
    assert found[index("<0x78>")] == {"<0x78>": 1.0}


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_the_space_that_a_tokenizer_adds_is_not_of_the_token(scheme: str) -> None:
    found = becomes(words("the", " the", "thecat", " thes", "cat"), unigram(scheme=scheme))
    assert found[:2] == [{"the": 1.0}, {"▁the": 1.0}]
    assert found[2] == {"the": 1 / 1.1, "cat": 0.1 / 1.1}
    assert found[3] == {"▁the": 1 / 1.1, "s": 0.1 / 1.1}
    assert found[4] == {"cat": 1.0}


def test_a_lead_that_the_tokenizer_lacks() -> None:
    """Without a newline the text is put after a full stop; without that only namesakes are found."""
    vocabulary = [("<unk>", 0.0), *((piece, -2.0 - len(piece)) for piece in (".", "▁", "▁a", "b", "ab", "a"))]
    for pieces, wanted in ((vocabulary, {"ab": 1 / 1.1, "b": 0.1 / 1.1}), (vocabulary[:1] + vocabulary[2:], {})):
        teacher = fast(
            models.Unigram(pieces, unk_id=0),
            pre_tokenizer=pre_tokenizers.Metaspace(split=False),
            decoder=decoders.Metaspace(),
        )
        assert becomes(words("abb", "b"), teacher) == [wanted, {"b": 1.0}]


def test_special_tokens() -> None:
    student = words("</s>", "x", special=("<|im|>", "<|none|>"), eos_token="<|end|>", bos_token="<s>")
    found = dict(zip(student.convert_ids_to_tokens(range(len(student))), becomes(student, LLAMA), strict=True))
    assert found["<|end|>"] == {"</s>": 1.0}  # its role
    assert found["<s>"] == {"<s>": 1.0}  # its namesake
    assert found["<|im|>"] == found["<|none|>"] == {}
    eot, end = student.convert_tokens_to_ids("<|im|>"), LLAMA.convert_tokens_to_ids("</s>")
    given = becomes(student, LLAMA, roles=((eot, end), (None, 3), (0, None), (1, len(LLAMA)), (student.bos_token_id, end)))
    assert given[eot] == given[student.bos_token_id] == {"</s>": 1.0}  # as it was asked for
    assert given[:2] == [found["</s>"], found["x"]]
    assert found["</s>"] == {}  # text, which the teacher's tokenizer reads as the end


def test_a_namesake_that_text_is_not_split_into() -> None:
    teacher = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[])))
    assert becomes(words("ab", "ba"), teacher) == [{"ab": 1.0}, {"b": 1 / 1.1, "a": 0.1 / 1.1}]


def test_parts_of_characters() -> None:
    """Bytes that the teacher has become those; others are no text that could be split."""
    vocabulary = {"ð": 0, "ðŁ": 1, "a": 2}
    student = fast(
        models.BPE(vocab=vocabulary, merges=[]), pre_tokenizer=pre_tokenizers.ByteLevel(), decoder=decoders.ByteLevel()
    )
    assert token_bytes(student) == [b"\xf0", b"\xf0\x9f", b"a"]
    assert becomes(student, LLAMA) == [{"<0xF0>": 1.0}, {}, {"a": 1.0}]
    assert becomes(student, unigram(byte_fallback=False))[1] == {}


def test_tokens_between_byte_level_tokenizers_spell_the_same() -> None:
    student, teacher = tiny_tokenizer(), tiny_tokenizer(vocab_size=290)
    ids, weights = token_projection(student, teacher, sizes=(len(student), len(teacher)), width=12)
    ours, theirs = token_bytes(student), token_bytes(teacher)
    for text, row, w in zip(ours, ids.tolist(), weights.tolist(), strict=True):
        assert b"".join(theirs[index] for index, share in zip(row, w, strict=True) if share) == text
        assert sum(w) == pytest.approx(1.0)
        assert sorted(w, reverse=True) == w


@pytest.mark.parametrize(("width", "decay", "shares"), [(1, 0.1, [1.0]), (2, 0.5, [2 / 3, 1 / 3]), (3, 0.0, [1.0, 0.0, 0.0])])
def test_width_and_decay(width: int, decay: float, shares: list[float]) -> None:
    ids, weights = token_projection(words("tsa"), LLAMA, sizes=(1, len(LLAMA)), width=width, decay=decay)
    assert weights.tolist() == [pytest.approx(shares)]
    assert LLAMA.convert_ids_to_tokens(ids[0].tolist()) == ["t", "s", "a"][:width]


def test_sizes_of_heads() -> None:
    cat = LLAMA.convert_tokens_to_ids("cat")
    student = words("cat", "c", eos_token="</s>")
    ids, weights = token_projection(student, LLAMA, sizes=(5, cat))
    assert ids.shape == weights.shape == (5, 4)
    assert weights.sum(-1).tolist() == [0.0, 1.0, 1.0, 0.0, 0.0]  # "cat" is beyond the head, as are ids without a token
    assert token_projection(student, LLAMA, sizes=(5, 2))[1].sum() == 0.0
    assert token_projection(student, LLAMA, sizes=(1, len(LLAMA)))[0].tolist() == [[cat, 0, 0, 0]]


def test_a_tokenizer_that_changes_texts() -> None:
    teacher = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    teacher.normalizer = normalizers.Lowercase()
    found = becomes(words("ab", "Ab"), PreTrainedTokenizerFast(tokenizer_object=teacher))
    assert found == [{"a": 1 / 1.1, "b": 0.1 / 1.1}, {}]


@pytest.mark.parametrize("options", [{"width": 0}, {"decay": -0.1}, {"decay": 1.1}])
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="width >= 1 and decay between"):
        token_projection(LLAMA, LLAMA, sizes=(3, 3), **options)

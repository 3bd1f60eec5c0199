"""Rows for another vocabulary: what is copied, what is made of what, by plain loops; and the tokenizer of bytes."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from kdlib.tokenizers import surface_vectors, token_bytes
from kdlib.tokenizers.initial import Method, Plan
from kdlib.tokenizers.pure_bytes import byte_tokenizer
from kdlib.tokenizers.transplant import Speller, transplant_plan, transplanted_rows
from tests.tiny import tiny_tokenizer

CORPUS = [
    "She had seven apples, ate three of them, and sold the others. How many are left?",
    "Is it true? Three cats ate the sky.\n",
] * 3
NO_TEXT = range(8)  # the special tokens of tiny_tokenizer
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
METHODS: tuple[Method, ...] = ("fvt", "mean", "tokenadapt")


@cache
def tiny_unigram(*, scheme: str = "always") -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer: spaces are ``▁``, one is put before a text, other characters are unknown."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@cache
def llama() -> PreTrainedTokenizerFast:
    """Llama-2 style: ``▁`` is put before a text by the normalizer, unknown characters become bytes."""
    pieces = ["<unk>", "<s>", "</s>", *FALLBACK, "▁", *"acenpst", "é", "at", "cat", "▁cat", "▁▁"]
    merges = [("a", "t"), ("c", "at"), ("▁", "cat"), ("▁", "▁")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def matrix(rows: int, *, width: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def words(*vocabulary: str, special: tuple[str, ...] = (), **roles: str) -> PreTrainedTokenizerFast:
    """One token for each word, as it is written, then the special ones."""
    tokenizer = Tokenizer(models.WordLevel(vocab={word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


TEXTS = [b"cat", b" cat", b"cats", b"  cats", b"at ", b" ", b"\n", "é".encode(), "né".encode(), b"\xc3", b"at\xe2\x80", b"A"]


@pytest.mark.parametrize("old", [tiny_tokenizer(), llama(), ByT5Tokenizer()], ids=["bytes", "llama", "python"])
def test_pieces_spell_the_bytes_without_a_space_before_them(old: Any) -> None:
    known = token_bytes(old)
    found = Speller(old).pieces(TEXTS)
    assert [b"".join(known[index] for index in ids) for ids in found] == TEXTS


def test_pieces_are_those_that_the_tokenizer_makes_within_a_text() -> None:
    ids = llama().get_vocab()
    found = Speller(llama()).pieces([b"cats", b" cats", b"at\xe2", b"<s>"])
    assert found[:3] == [[ids[p] for p in pieces] for pieces in (["cat", "s"], ["▁cat", "s"], ["at", "<0xE2>"])]
    assert ids["<s>"] not in found[3]
    assert Speller(tiny_unigram()).pieces(["é".encode(), "catsé".encode(), b"\xff"]) == [[], [], []]


def by_loop(e: Tensor, old: Any, new: Any, *, method: str, like: dict[str, str]) -> dict[int, Tensor]:
    """{new id: row} by definition, from an ``old`` byte-level BPE; ``like``: {new special token: old one}."""
    spelled, wanted = token_bytes(old), token_bytes(new)
    exact = {content: index for index, content in enumerate(spelled)}
    x, y = (surface_vectors(t, vocab_size=len(token_bytes(t))) for t in (new, old))
    found = {}
    for index, content in enumerate(wanted):
        name = new.convert_ids_to_tokens(index)
        if name in like:
            found[index] = e[old.convert_tokens_to_ids(like[name])]
        elif content in exact and name not in new.all_special_tokens:
            found[index] = e[exact[content]]
        elif method == "mean":
            found[index] = e[: len(old)].mean(0)
        else:
            ids = old.encode(content.decode(), add_special_tokens=False)
            local = torch.ones(len(ids)) / len(ids)
            if method == "tokenadapt":
                shares = [len(spelled[i]) / len(content) for i in ids]
                local = weights([(float(cosine(x[index], y[i])) + n) / 2 for i, n in zip(ids, shares, strict=True)])
            row = sum(w * e[i] for w, i in zip(local.tolist(), ids, strict=True))
            near = sorted((float(cosine(x[index], y[i])), i) for i in range(len(old)) if i not in NO_TEXT)[-3:]
            near = [(c, i) for c, i in near if c >= 0.6]
            if method == "tokenadapt" and near:
                around = weights([c for c, _ in near])
                row = 0.7 * row + 0.3 * sum(w * e[i] for w, (_, i) in zip(around.tolist(), near, strict=True))
            found[index] = row
    return found


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b) / (a.norm() * b.norm())


def weights(scores: list[float]) -> Tensor:
    return torch.tensor([math.exp(score / 0.3) for score in scores]) / sum(math.exp(score / 0.3) for score in scores)


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_those_of_a_plain_loop(method: Method) -> None:
    old, new = tiny_tokenizer(), tiny_unigram()
    e = matrix(len(old) + 8)  # padding entries of the model are no tokens
    e[len(old) :] = 1e6
    found = transplanted_rows(e, old, new, method=method)
    expected = by_loop(e, old, new, method=method, like={"<s>": "<|bos|>", "</s>": "<|eos|>"})
    assert found.shape == (len(new), 5)
    torch.testing.assert_close(found, torch.stack([expected[i] for i in range(len(new))]), rtol=1e-5, atol=1e-6)
    copied, summed, otherwise = transplant_plan(old, new, method=method).counts
    assert copied > 10 and copied + summed + otherwise == len(new)
    assert (summed, otherwise) == ((0, len(new) - copied) if method == "mean" else (len(new) - copied, 0))


def test_tokenadapt_has_tokens_with_and_without_neighbours() -> None:
    """Of the oracle's cases above, where the published code has NaN."""
    old, new = tiny_tokenizer(), tiny_unigram()
    plans = [transplant_plan(old, new, method=method) for method in ("fvt", "tokenadapt")]
    entries = [torch.bincount(plan.sums[0], minlength=len(new)) for plan in plans]
    more = entries[1] > entries[0]
    assert more.any() and (more < (entries[0] > 0)).any()
    assert transplanted_rows(matrix(len(old)), old, new, method="tokenadapt").isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_what_no_old_tokens_spell_is_drawn_around_the_mean(method: Method) -> None:
    """Byte 0xFF is in no token of the old tokenizer and looks like none."""
    old, new = tiny_unigram(), byte_tokenizer(tiny_unigram())
    e = matrix(len(old), width=400)
    found = transplanted_rows(e, old, new, method=method, seed=3)[0xFF]
    if method == "mean":
        torch.testing.assert_close(found, e.mean(0))
        return
    z = (found - e.mean(0)) / e.std(0, correction=0)
    assert abs(float(z.mean())) < 0.2 and abs(float(z.std()) - 1) < 0.2
    again, other = (transplanted_rows(e, old, new, method=method, seed=seed)[0xFF] for seed in (3, 4))
    assert torch.equal(found, again) and not torch.equal(found, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_copied_rows_keep_their_bits_and_sums_are_wide(dtype: torch.dtype) -> None:
    old, new = tiny_tokenizer(), tiny_unigram()
    e, plan = matrix(len(old), dtype=dtype), transplant_plan(old, new)
    found, exact = plan.rows(e, seed=0), plan.rows(e.double(), seed=0)
    copied = plan.copied >= 0
    assert found.dtype == dtype and torch.equal(found[copied], e[plan.copied[copied]])
    # rounded once, from float32
    torch.testing.assert_close(found.double(), exact, rtol=2**-8 if dtype == torch.bfloat16 else 1e-7, atol=1e-12)


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), tiny_unigram(), llama()], ids=["bytes", "unigram", "llama"])
def test_onto_itself_nothing_changes(tokenizer: PreTrainedTokenizerFast) -> None:
    e = matrix(len(tokenizer))
    for method in METHODS:
        assert torch.equal(transplanted_rows(e, tokenizer, tokenizer, method=method), e)


def test_the_same_text_is_the_same_token_however_it_is_written() -> None:
    old, new = llama(), tiny_tokenizer()
    plan, theirs, ours = transplant_plan(old, new), old.get_vocab(), new.get_vocab()
    pairs = {"Ġ": "▁", "Ċ": "<0x0A>", "Ã": "<0xC3>", "a": "a", "A": "<0x41>", "<|eos|>": "</s>", "<|bos|>": "<s>"}
    assert {piece: int(plan.copied[ours[piece]]) for piece in pairs} == {p: theirs[q] for p, q in pairs.items()}
    assert plan.copied[ours["<|pad|>"]] == -1  # the old one has none
    back = transplant_plan(new, old)
    assert [int(back.copied[theirs[p]]) for p in ("▁", "a", "<0x0A>")] == [ours[p] for p in ("Ġ", "a", "Ċ")]


def test_a_likelihood_is_not_given_to_two_tokens() -> None:
    """``<0x61>`` beside ``a`` is never written: a copy of its row would halve the probability of ``a``."""
    old, new = tiny_tokenizer(), llama()
    e = matrix(len(old))
    found, plan = transplanted_rows(e, old, new), transplant_plan(old, new)
    spare = new.convert_tokens_to_ids("<0x61>")
    torch.testing.assert_close(found[spare], e.mean(0))
    assert torch.equal(found[new.convert_tokens_to_ids("a")], e[old.convert_tokens_to_ids("a")])
    copied = plan.copied[plan.copied >= 0].tolist()
    assert len(copied) == len(set(copied))


def test_special_tokens_move_by_content_then_by_role_and_once() -> None:
    old = words("?", "b", "<r>", special=("<e>", "<x>"), eos_token="<e>", pad_token="<e>", unk_token="?")
    new = words("?", "<x>", special=("<end>", "<p>", "<r>", "<turn>"), eos_token="<end>", pad_token="<p>", unk_token="?")
    plan = transplant_plan(old, new, roles={new.convert_tokens_to_ids("<turn>"): old.convert_tokens_to_ids("<x>")})
    moved = {new.convert_ids_to_tokens(i): int(plan.copied[i]) for i in range(len(new))}
    ids = old.get_vocab()
    assert moved["<end>"] == ids["<e>"] and moved["<turn>"] == ids["<x>"]
    assert moved["<p>"] == -1  # not another end of text
    assert moved["<x>"] == -1  # text that is written like a special token


def test_what_cannot_be_done_is_said_in_one_line() -> None:
    old = tiny_tokenizer()
    with pytest.raises(ValueError, match="the model has 20 embedding rows and its tokenizer tokens up to id"):
        transplanted_rows(matrix(20), old, tiny_unigram())
    with pytest.raises(ValueError, match="method is fvt, mean, tokenadapt, not 'zett'"):
        transplanted_rows(matrix(len(old)), old, tiny_unigram(), method="zett")  # type: ignore[arg-type]


def test_counts_of_a_plan() -> None:
    sums = (torch.tensor([1, 1, 3]), torch.tensor([0, 1, 1]), torch.tensor([0.5, 0.5, 1.0]))
    plan = Plan(copied=torch.tensor([0, -1, -1, -1]), sums=sums, drawn=torch.zeros(4, dtype=torch.bool), old=torch.arange(2))
    assert plan.counts == (1, 2, 1)
    e = torch.tensor([[1.0], [3.0]])
    assert plan.rows(e, seed=0).tolist() == [[1.0], [2.0], [2.0], [3.0]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("bytes")
    byte_tokenizer(llama()).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


@given(text=st.text())
@example("  cats ▁ Ġ <0x41> ## \x00\r\n\t 👩‍👧 ﬁ é e\u0301 \u2028 ")
@settings(deadline=None, max_examples=60)
def test_bytes_are_tokens_and_every_text_is_itself_again(saved: Any, text: str) -> None:
    ids = saved.encode(text, add_special_tokens=False)
    assert ids == list(text.encode())
    assert saved.decode(ids) == text


def test_the_tokenizer_of_bytes_has_the_special_tokens_by_role(saved: Any) -> None:
    assert token_bytes(saved)[:256] == [bytes([byte]) for byte in range(256)]
    assert (saved.bos_token, saved.eos_token, saved.unk_token, saved.pad_token) == ("<s>", "</s>", "<unk>", None)
    assert len(saved) == 259 and saved.encode("a</s>") == [ord("a"), saved.eos_token_id]
    assert saved.decode([ord("a"), saved.eos_token_id], skip_special_tokens=True) == "a"


def test_the_tokenizer_of_bytes_begins_texts_as_the_old_one() -> None:
    backend = Tokenizer.from_str(llama().backend_tokenizer.to_str())
    ids = [("<s>", llama().bos_token_id), ("</s>", llama().eos_token_id)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    made = byte_tokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"))
    assert made.encode("é") == [made.bos_token_id, 0xC3, 0xA9, made.eos_token_id]


def test_a_shared_model_can_be_turned_to_bytes() -> None:
    path = Path(__file__).parents[2] / "../shared/models/gsm8k-lm"
    if not path.is_dir():
        pytest.skip(f"needs the model in {path}")
    old = AutoTokenizer.from_pretrained(path)
    assert transplant_plan(old, byte_tokenizer(old)).counts == (260, 0, 0)

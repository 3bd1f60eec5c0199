"""The bytes of tokens, of all kinds of tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, BertTokenizer, ByT5Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast, PythonBackend

from kdlib.tokenizers.pieces import gpt2_alphabet, token_bytes
from tests.tiny import tiny_tokenizer

GSM8K_LM = Path(__file__).parents[2] / "../shared/models/gsm8k-lm"
FALLBACK = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁the", "▁cat", "cat", "▁", "s", "é", "▁▁", "Ġ", "##s", "the", "▁<0x4", "1>"]
TEXTS = st.one_of(st.text(), st.lists(st.sampled_from(["the", "cat", " ", "s", "é", "Ġ", "##s", "\n", "e\u0301"])).map("".join))


def fast(model: models.Model, **parts: object) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def unigram(*, scheme: str = "never", byte_fallback: bool = True) -> PreTrainedTokenizerFast:
    vocabulary = [("<unk>", 0.0), *((piece, -20.0) for piece in FALLBACK), *((word, -2.0 - len(word)) for word in WORDS)]
    return fast(
        models.Unigram(vocabulary, unk_id=0, byte_fallback=byte_fallback),
        pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False),
        decoder=decoders.Metaspace(prepend_scheme=scheme),
    )


def llama_model() -> models.BPE:
    pieces = ["<unk>", "<s>", "</s>", *FALLBACK, "▁", "c", "a", "t", "s", "é", "ca", "cat", "▁cat", "▁▁"]
    merges = [("c", "a"), ("ca", "t"), ("▁", "cat"), ("▁", "▁")]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def llama(*, decoder: bool = True) -> PreTrainedTokenizerFast:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    prefix = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = fast(llama_model(), normalizer=prefix, **({"decoder": decoders.Sequence(steps)} if decoder else {}))
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    return tokenizer


def wordpiece(*, bert: bool = False) -> PreTrainedTokenizerFast:
    special = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]
    vocabulary = {piece: index for index, piece in enumerate([*special, "cat", "##s", "Ġ", "▁x", "##", "#", "<0x41>"])}
    if bert:
        return BertTokenizer(vocab=vocabulary)
    model = models.WordPiece(vocab=vocabulary, unk_token="[UNK]")
    return fast(model, pre_tokenizer=pre_tokenizers.WhitespaceSplit(), decoder=decoders.WordPiece())


def joined(tokenizer: PreTrainedTokenizerFast, text: str) -> bytes:
    known = token_bytes(tokenizer)
    return b"".join(known[index] for index in tokenizer(text, add_special_tokens=False)["input_ids"])


BYTE_LEVEL, UNIGRAM, LLAMA = tiny_tokenizer(), unigram(), llama()
LLAMA_CLASS = LlamaTokenizer(vocab=LLAMA.get_vocab(), merges=[("c", "a"), ("ca", "t"), ("▁", "cat")])


@given(text=TEXTS)
@example("▁ Ġ ## <0x41> \x00\r\n\t 👩‍👧 ﬁ é e\u0301 \u2028")
@settings(deadline=None, max_examples=60)
def test_byte_level_tokens_join_to_the_text(text: str) -> None:
    assert joined(BYTE_LEVEL, text) == text.encode()


@given(text=TEXTS)
@example("  cats  Ġ ##s \x00\r\n\t 👩‍👧 ﬁ é e\u0301")
@settings(deadline=None, max_examples=60)
def test_tokens_with_byte_fallback_join_to_the_text_with_its_prefix_space(text: str) -> None:
    read = text.replace("▁", " ").encode()  # to these a literal one is a space
    assert joined(UNIGRAM, text) == read
    assert joined(LLAMA, text) == (b" " + read if text else b"")
    assert joined(LLAMA_CLASS, text) == (b"" if not text else read if read[:1] == b" " else b" " + read)


def test_the_bytes_of_byte_level_pieces() -> None:
    found = token_bytes(BYTE_LEVEL)
    ids = BYTE_LEVEL.get_vocab()
    assert [found[ids[piece]] for piece in ("Ġ", "Ċ", "a", "Ã", "<|eos|>")] == [b" ", b"\n", b"a", b"\xc3", b"<|eos|>"]
    assert len(found) == len(BYTE_LEVEL)
    assert set(gpt2_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(gpt2_alphabet().values()) == list(range(256))


def test_the_bytes_of_pieces_with_metaspace_and_fallback() -> None:
    undecoded = unigram()
    undecoded.backend_tokenizer.decoder = None
    for tokenizer in (unigram(), unigram(scheme="always"), undecoded, llama(), llama(decoder=False), LLAMA_CLASS):
        found, ids = token_bytes(tokenizer), tokenizer.get_vocab()
        assert found[ids["▁cat"]] == b" cat"
        assert found[ids["é"]] == "é".encode()
        assert [found[ids[piece]] for piece in FALLBACK] == [bytes([byte]) for byte in range(256)]
        assert found[ids["<unk>"]] == b"<unk>"


def test_marks_of_other_kinds_are_text() -> None:
    found, ids = token_bytes(UNIGRAM), UNIGRAM.get_vocab()
    assert [found[ids[piece]] for piece in ("Ġ", "##s", "▁<0x4")] == ["Ġ".encode(), b"##s", b" <0x4"]
    assert joined(BYTE_LEVEL, "▁<0x41>Ġ##s") == "▁<0x41>Ġ##s".encode()
    without, ids = token_bytes(unigram(byte_fallback=False)), unigram().get_vocab()
    assert without[ids["<0x41>"]] == b"<0x41>"
    near = fast(models.BPE(vocab={"a<0x41>": 0, "<0x0a>": 1, "<0x410>": 2}, merges=[], byte_fallback=True))
    assert token_bytes(near) == [b"a<0x41>", b"<0x0a>", b"<0x410>"]
    plain = fast(models.BPE(vocab={"Ġa": 0, "▁a": 1, "<0x41>": 2, "##a": 3, "a</w>": 4}, merges=[]))
    assert token_bytes(plain) == ["Ġa".encode(), "▁a".encode(), b"<0x41>", b"##a", b"a</w>"]


@pytest.mark.parametrize("bert", [False, True])
def test_wordpieces_have_no_spaces_and_no_marks(bert: bool) -> None:
    tokenizer = wordpiece(bert=bert)
    found, ids = token_bytes(tokenizer), tokenizer.get_vocab()
    pieces = ("cat", "##s", "Ġ", "▁x", "##", "#", "<0x41>", "[UNK]")
    assert [found[ids[piece]] for piece in pieces] == [
        b"cat",
        b"s",
        "Ġ".encode(),
        "▁x".encode(),
        b"##",
        b"#",
        b"<0x41>",
        b"[UNK]",
    ]
    assert joined(tokenizer, "cats cat") == b"catscat"


def test_marks_of_a_words_end_are_no_text() -> None:
    words = fast(models.BPE(vocab={"a</w>": 0, "a": 1, "</w>": 2}, merges=[], end_of_word_suffix="</w>"))
    assert token_bytes(words) == [b"a", b"a", b"</w>"]
    model = models.BPE(vocab={"Ã©</w>": 0, "Ã": 1}, merges=[], end_of_word_suffix="</w>")
    assert token_bytes(fast(model, pre_tokenizer=pre_tokenizers.ByteLevel())) == ["é".encode(), b"\xc3"]


def test_added_tokens_are_what_is_written() -> None:
    tokenizer = tiny_tokenizer()
    size = len(tokenizer)
    begin = "<\uff5cbegin▁of\uff5c>"  # as DeepSeek writes it
    tokenizer.add_tokens(["é Ġ", AddedToken(begin, special=True)])
    assert token_bytes(tokenizer)[size:] == ["é Ġ".encode(), begin.encode()]
    assert joined(tokenizer, f"cafés é Ġs {begin}") == f"cafés é Ġs {begin}".encode()
    spaced = llama()
    spaced.add_tokens(["▁▁", "<▁>", "<0x0A>"])  # Gemma adds runs of spaces that its model has
    spaced.add_special_tokens({"pad_token": "▁pad"})
    found, ids = token_bytes(spaced), spaced.get_vocab()
    assert [found[ids[piece]] for piece in ("▁▁", "<▁>", "<0x0A>", "▁pad")] == [b"  ", "<▁>".encode(), b"\n", "▁pad".encode()]


def test_special_tokens_of_the_model_are_what_is_written() -> None:
    vocabulary = {"<▁s>": 0, "<▁t>": 1, "é <t>": 2}
    spaced = fast(models.BPE(vocab=vocabulary, merges=[]), pre_tokenizer=pre_tokenizers.Metaspace())
    spaced.add_special_tokens({"bos_token": "<▁s>"})
    assert token_bytes(spaced) == ["<▁s>".encode(), b"< t>", "é <t>".encode()]
    byte_level = fast(models.BPE(vocab=vocabulary, merges=[]), pre_tokenizer=pre_tokenizers.ByteLevel())
    assert token_bytes(byte_level) == [piece.encode() for piece in vocabulary]  # no text has such pieces


def test_ids_without_a_token_are_empty() -> None:
    found = token_bytes(BYTE_LEVEL, vocab_size=len(BYTE_LEVEL) + 3)
    assert found[:-3] == token_bytes(BYTE_LEVEL)
    assert found[-3:] == [b"", b"", b""]
    assert token_bytes(BYTE_LEVEL, vocab_size=5) == found[:5]
    gaps = fast(models.WordLevel(vocab={"a": 0, "b": 3}, unk_token="a"))
    assert token_bytes(gaps) == [b"a", b"", b"", b"b"]
    nothing = fast(models.BPE(vocab={}, merges=[]))
    assert token_bytes(nothing) == []
    assert token_bytes(nothing, vocab_size=2) == [b"", b""]


class Letters(PythonBackend):
    """A Python tokenizer outside transformers: letters are tokens."""

    vocab_size = 3

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0, "Ġ": 1, "Ã": 2}

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab()[token]

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.get_vocab())[index]


def test_python_tokenizers(tmp_path: Path) -> None:
    from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

    bytewise = ByT5Tokenizer()
    bytewise.add_tokens(["<ü>"])
    text = "é\x00 <<ü>"
    assert b"".join(token_bytes(bytewise)[i] for i in bytewise(text, add_special_tokens=False)["input_ids"]) == text.encode()
    assert token_bytes(bytewise)[:3] == [b"<pad>", b"</s>", b"<unk>"]
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\n##s\n")
    assert token_bytes(BertTokenizerLegacy(str(tmp_path / "vocab.txt")))[1:] == [
        b"[UNK]",
        b"[CLS]",
        b"[SEP]",
        b"[MASK]",
        b"cat",
        b"s",
    ]


def test_python_tokenizers_with_a_table_of_bytes() -> None:
    tokenizer = Letters()
    tokenizer.byte_decoder = gpt2_alphabet()
    assert token_bytes(tokenizer) == [b"a", b" ", b"\xc3"]


def test_python_sentencepiece(tmp_path: Path) -> None:
    spm = pytest.importorskip("sentencepiece")
    from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

    options = {"vocab_size": 300, "byte_fallback": True, "normalization_rule_name": "identity", "minloglevel": 2}
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sees the cats", "two cats and the dog"] * 20),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        hard_vocab_limit=False,
        remove_extra_whitespaces=False,
        **options,
    )
    tokenizer = SentencePieceBackend(vocab_file=str(tmp_path / "m.model"), unk_token="<unk>")
    tokenizer.add_tokens(["<▁>"])
    text = "two  cats, é👩\n"
    assert joined(tokenizer, text) == b" " + text.encode()
    assert token_bytes(tokenizer)[-1] == "<▁>".encode()


def test_unknown_kinds_are_refused() -> None:
    model = models.BPE(vocab={"a": 0}, merges=[])
    regex = decoders.Replace(Regex("▁+"), " ")
    refused = {
        "decoder of CTC": fast(model, decoder=decoders.CTC()),
        "decoder of Metaspace beside ByteLevel": fast(
            model, pre_tokenizer=pre_tokenizers.ByteLevel(), decoder=decoders.Metaspace()
        ),
        "Python tokenizer of its own": Letters(),
        "replaces .* by '-'": fast(model, decoder=decoders.Replace("▁", "-")),
        "replaces .*Regex": fast(model, decoder=decoders.Sequence([regex, decoders.Fuse()])),
    }
    for message, tokenizer in refused.items():
        with pytest.raises(ValueError, match=message) as error:
            token_bytes(tokenizer)
        assert "\n" not in str(error.value)


def test_the_tokens_of_a_trained_model() -> None:
    if not GSM8K_LM.is_dir():
        pytest.skip(f"needs the model in {GSM8K_LM}")
    tokenizer = AutoTokenizer.from_pretrained(GSM8K_LM)
    text = "<|user|>Natalia sold 48 clips — é👩‍👧\n\n  48/2 = 24 ▁Ġ<|eos|>"
    assert joined(tokenizer, text) == text.encode()
    assert len(token_bytes(tokenizer)) == len(tokenizer)

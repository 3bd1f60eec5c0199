"""Byte spans: right at every token, or an error that says why there are none."""

from __future__ import annotations

import gc
import weakref
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from kdlib.tokenizers.pieces import token_bytes
from kdlib.tokenizers.spans import LossyTokenizationError, byte_spans, keeps_spaces, spans_in_text, spans_of_ids
from tests.tokenizers import families
from tests.tokenizers.families import CHANGING, LOSSLESS, TEXTS, family, real_texts

AWKWARD = [
    "▁",
    "<0x41>",
    "</s>",
    "<s>",
    "<unk>",
    "[UNK]",
    " ",
    "  ",
    "\t",
    "\r\n",
    "\n",
    "\x00",
    "é",
    "e\u0301",
    "ﬁ",
    "👩‍👧",
    "東京",
]
AWKWARD += ["the ", "clips", "48", "\u00a0", "\u3000", "\x1c", "\u200b", "İ", "ß", "<|user|>", "<think>", "##s", "Ġ"]
TEXT = st.one_of(st.text(max_size=30), st.lists(st.sampled_from(AWKWARD), max_size=8).map("".join))
CHAT = {name: families.with_added(LOSSLESS[name]()) for name in ("byte-level", "unigram", "llama2", "wordpiece")}
SPACES = " \t\n\v\f\r\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))


known_bytes = cache(token_bytes)


def check(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """Spans are right by the definition, looked at token by token; False where the tokenizer is said to change the text."""
    try:
        ids, spans = byte_spans(tokenizer, text)
    except LossyTokenizationError as error:
        assert "\n" not in str(error)
        assert "byte " in str(error)
        return False
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert spans.shape == (len(ids), 2)
    assert spans.dtype == np.int64
    known, added, source, end = known_bytes(tokenizer), tokenizer.added_tokens_decoder, text.encode(), 0
    begins_stretch = True
    for index, (begin, after) in zip(ids, spans.tolist(), strict=True):
        gap = source[end:begin].decode()
        assert not gap or (not keeps_spaces(tokenizer) and not gap.strip(SPACES))
        found = source[begin:after]
        prefixed = begins_stretch and b" " + found == known[index]
        assert found == known[index] or prefixed or (index in added and found.decode().strip() == known[index].decode())
        end, begins_stretch = after, index in added
    rest = source[end:].decode()
    assert not rest or (not keeps_spaces(tokenizer) and not rest.strip(SPACES))
    return True


@pytest.mark.parametrize("name", LOSSLESS)
def test_spans_of_texts(name: str) -> None:
    right = [check(family(name), text) for text in TEXTS]
    assert sum(right) >= 6
    if name in ("byte-level", "digits", "tiny", "bytes", "tekken"):
        assert all(right)


@pytest.mark.parametrize("name", [name for name in LOSSLESS if name != "wordpiece"])
def test_real_texts_are_covered(name: str) -> None:
    for text in real_texts(40):
        ids, spans = byte_spans(family(name), text)
        assert spans[0, 0] == 0
        assert spans[-1, 1] == len(text.encode())
        assert (spans[1:, 0] == spans[:-1, 1]).all()
        assert check(family(name), text)
        assert len(ids) > 10


@pytest.mark.parametrize("name", [*LOSSLESS, *CHANGING])
@given(text=TEXT)
@example("a▁b")
@example("<0x41>")
@example("<0x41>▁ </s>é")
@example(" a</s> b</s>c")
@settings(deadline=None, max_examples=40)
def test_spans_are_right_or_refused(name: str, text: str) -> None:
    right = check(family(name), text)
    if name in LOSSLESS and name != "wordpiece" and "▁" not in text and "<0x" not in text:
        assert right


@pytest.mark.parametrize("name", CHAT)
@given(text=TEXT)
@example("<|user|>\nclips <|user|> 48<think> the ")
@settings(deadline=None, max_examples=40)
def test_spans_with_added_tokens_are_right_or_refused(name: str, text: str) -> None:
    check(CHAT[name], text)


@pytest.mark.parametrize("name", ["unigram", "llama2", "sentencepiece32k"])
def test_the_space_before_a_text_has_no_bytes(name: str) -> None:
    tokenizer = family(name)
    ids, spans = byte_spans(tokenizer, "he")
    assert spans[0, 0] == 0
    assert spans[-1, 1] == 2
    assert known_bytes(tokenizer)[ids[0]].startswith(b" ")
    ids, spans = byte_spans(tokenizer, "👩")
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "▁"
    assert spans.tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [3, 4]]
    ids, spans = byte_spans(tokenizer, " he")
    assert spans[0, 0] == 0
    assert spans[-1, 1] == 3


def test_each_stretch_of_text_may_have_a_space_of_its_own() -> None:
    ids, spans = byte_spans(family("llama2"), "he</s>he</s> he")
    tokens = family("llama2").convert_ids_to_tokens(ids)
    marks = [i for i, token in enumerate(tokens) if token == "</s>"]
    assert spans[marks].tolist() == [[2, 6], [8, 12]]
    assert tokens[marks[0] + 1].startswith("▁")
    assert spans[marks[0] + 1, 0] == 6
    assert spans[marks[1] + 1 :].min() == 12
    assert byte_spans(family("llama2"), "</s> ")[1].tolist() == [[0, 4], [4, 4], [4, 5]]


def test_special_tokens_that_take_spaces_span_them() -> None:
    text = "48 <|user|>\n\nclips"
    for name in ("byte-level", "unigram"):
        ids, spans = byte_spans(CHAT[name], text)
        place = ids.index(CHAT[name].convert_tokens_to_ids("<|user|>"))
        assert text.encode()[slice(*spans[place])] == b" <|user|>\n\n"


@pytest.mark.parametrize("name", ["byte-level", "llama2", "wordpiece"])
def test_special_tokens_that_are_put_around_a_text_have_no_bytes(name: str) -> None:
    tokenizer = LOSSLESS[name]()
    mark = "[SEP]" if name == "wordpiece" else "</s>"
    index = tokenizer.convert_tokens_to_ids(mark)
    template = processors.TemplateProcessing(single=f"{mark} {mark} $A {mark}", special_tokens=[(mark, index)])
    tokenizer.backend_tokenizer.post_processor = template
    for text in ("", "the clips", f"{mark}48{mark}"):
        inner, expected = byte_spans(tokenizer, text)
        ids, spans = byte_spans(tokenizer, text, add_special_tokens=True)
        assert ids == [index, index, *inner, index] == tokenizer(text)["input_ids"]
        size = len(text.encode())
        assert spans.tolist() == [[0, 0], [0, 0], *expected.tolist(), [size, size]]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("unigram", "a▁b", "at byte 1 .*'▁b'.*literal '▁' as a space"),
        ("sentencepiece32k", "a▁b", "literal '▁' as a space"),
        ("unigram", "<0x41>", "at byte 0 .*literal '<0x41>' as one byte"),
        ("unigram without bytes", "the ☃", "at byte 4 .*has no token for it"),
        ("wordpiece", "the ☃", "token 1 .*at byte 4 .*has no token for it"),
        ("unigram stripped", "he \n", "end at byte 2 .*left out"),
        ("byte-level NFC", "cafe\u0301", "at byte 3 .*changed the text"),
        ("byte-level lowercase", "the Cat", "at byte 4 .*changed the text"),
        ("wordpiece of BERT", "clips\x00s", "at byte 5 "),
    ],
)
def test_a_changed_text_is_refused_with_its_reason(name: str, text: str, message: str) -> None:
    with pytest.raises(LossyTokenizationError, match=message) as error:
        byte_spans(family(name), text)
    assert "Leave this text out" in str(error.value)


def test_normalizers_that_change_nothing_are_no_reason() -> None:
    for name in ("byte-level NFC", "unigram NFKC"):
        assert check(family(name), "NFC é, the clips")


def test_spaces_lie_in_no_wordpiece() -> None:
    text = "the  clips,\u3000sold\n"
    ids, spans = byte_spans(family("wordpiece"), text)
    source = text.encode()
    assert b"".join(source[begin:end] for begin, end in spans.tolist()) == b"theclips,sold"
    assert source[: spans[0, 1]].strip() == source[spans[0, 0] : spans[0, 1]]
    assert len(ids) == len(spans)
    # a token that was added with a space inside is in the text as it is written
    tokenizer = LOSSLESS["wordpiece"]()
    tokenizer.add_tokens(["half as"])
    assert byte_spans(tokenizer, " half as  clips")[1][0].tolist() == [1, 8]


def test_which_tokenizers_keep_spaces() -> None:
    kept = {name: keeps_spaces(family(name)) for name in (*LOSSLESS, *CHANGING)}
    assert {name for name, keeps in kept.items() if not keeps} == {name for name in kept if name.startswith("wordpiece")}
    assert keeps_spaces(ByT5Tokenizer())
    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, " ": 1}, merges=[])))
    assert keeps_spaces(plain)


def test_python_tokenizers() -> None:
    tokenizer = ByT5Tokenizer()
    assert check(tokenizer, "é\x00 </s> 👩")
    ids, spans = byte_spans(tokenizer, "é", add_special_tokens=True)
    assert (ids[-1], spans.tolist()) == (tokenizer.eos_token_id, [[0, 1], [1, 2], [2, 2]])


@pytest.mark.parametrize("name", [name for name in LOSSLESS if name != "wordpiece"])
def test_ids_alone_spell_the_text(name: str) -> None:
    tokenizer = family(name)
    for text in ("the clips", "48 👩 é\n", "the  x "):
        ids, expected = byte_spans(tokenizer, text)
        found, spans = spans_of_ids(tokenizer, ids)
        assert found == text.encode()
        assert np.array_equal(spans, expected)
        later, _ = spans_of_ids(tokenizer, ids, begins_text=False)
        assert later in (found, b" " + found)
        assert (later != found) == (b"".join(known_bytes(tokenizer)[index] for index in ids) != found)


def test_a_space_that_begins_ids_is_taken_for_the_one_put_before_a_text() -> None:
    for name, text in (("unigram", b"he"), ("llama2", b" he"), ("byte-level", b" he")):
        assert spans_of_ids(family(name), byte_spans(family(name), " he")[0])[0] == text


def test_special_tokens_among_ids_are_no_text() -> None:
    tokenizer = family("llama2")
    inner, expected = byte_spans(tokenizer, "clips")
    text, spans = spans_of_ids(tokenizer, [tokenizer.bos_token_id, *inner, tokenizer.eos_token_id])
    assert text == b"clips"
    assert spans.tolist() == [[0, 0], *expected.tolist(), [5, 5]]
    half = byte_spans(family("bytes"), "é")[0][:1]
    assert spans_of_ids(family("bytes"), half)[0] == b"\xc3"  # a character that is not whole
    text, spans = spans_of_ids(tokenizer, [])
    assert (text, spans.shape) == (b"", (0, 2))


@pytest.mark.parametrize(
    ("name", "ids", "message"),
    [
        ("wordpiece", [5], "leaves out the spaces"),
        ("unigram", [5, 0], r"token 1 \(id 0\) is the unknown token"),
        ("sentencepiece32k", [0], "unknown token"),
        ("byte-level", [1, 10**6], r"token 1 \(id 1000000\) is no token"),
        ("byte-level", [-1], r"token 0 \(id -1\) is no token"),
    ],
)
def test_ids_that_spell_no_text_are_refused(name: str, ids: list[int], message: str) -> None:
    with pytest.raises(LossyTokenizationError, match=message) as error:
        spans_of_ids(family(name), ids)
    assert "\n" not in str(error.value)


def test_the_end_of_a_text_may_stand_for_the_unknown_token() -> None:
    tokenizer = LOSSLESS["byte-level"]()
    tokenizer.unk_token = "</s>"  # GPT-2
    assert spans_of_ids(tokenizer, [tokenizer.eos_token_id])[0] == b""


def test_tokens_added_later_are_seen() -> None:
    tokenizer = LOSSLESS["bytes"]()
    assert len(byte_spans(tokenizer, "<call>")[0]) == 6
    tokenizer.add_tokens(["<call>"])
    ids, spans = byte_spans(tokenizer, "a<call>")
    assert spans.tolist() == [[0, 1], [1, 7]]
    assert spans_of_ids(tokenizer, ids)[0] == b"a<call>"


def test_tables_do_not_keep_tokenizers_alive() -> None:
    tokenizer = LOSSLESS["bytes"]()
    byte_spans(tokenizer, "a")
    gone = weakref.ref(tokenizer)
    del tokenizer
    gc.collect()
    assert gone() is None


def test_texts_may_be_tokenised_at_once() -> None:
    tokenizer = family("unigram")
    texts = ["the clips", "48", ""]
    for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        assert np.array_equal(spans_in_text(tokenizer, text, ids), byte_spans(tokenizer, text)[1])
    with pytest.raises(LossyTokenizationError, match="at byte 0"):
        spans_in_text(tokenizer, "other", tokenizer("text", add_special_tokens=False)["input_ids"])


def test_mistral_tokenizers_are_their_own() -> None:
    """The converted tokenizers give the ids of mistral-common's own code, so that tests of them hold for these."""
    pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    own = Tekkenizer.from_file(families.shipped("tekken_240911.json"))
    for text in ("The café paid $1,234.50 — 62%!\n\n", "東京は 👩‍👧", "  x\t\r\n"):
        assert family("tekken")(text, add_special_tokens=False)["input_ids"] == own.encode(text, bos=False, eos=False)


def test_mistral_common_itself_is_refused_with_what_to_do() -> None:
    pytest.importorskip("mistral_common")
    from transformers.tokenization_mistral_common import MistralCommonBackend

    own = MistralCommonBackend(str(families.shipped("mistral_instruct_tokenizer_240323.model.v3")))
    with pytest.raises(ValueError, match="mistral_format=False"):
        token_bytes(own)


def test_normalizer_that_replaces_spaces_alone() -> None:
    """Gemma: no space is put before a text."""
    vocabulary = [("<unk>", 0.0), ("▁", -1.0), ("a", -1.0), ("▁a", -1.5)]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    gemma = families.fast(tokenizer, unk_token="<unk>")
    assert byte_spans(gemma, "a a")[1].tolist() == [[0, 1], [1, 3]]
    ids = gemma(" a", add_special_tokens=False)["input_ids"]
    assert spans_of_ids(gemma, ids)[0] == b" a"


def test_what_is_put_before_a_text_must_be_a_space() -> None:
    tokenizer = LOSSLESS["bytes"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("_")
    with pytest.raises(LossyTokenizationError, match=r"token 0 \('_'\) is not what the text has at byte 0 \('the'\)"):
        byte_spans(tokenizer, "the")


def test_no_token_lies_on_both_sides_of_a_space_that_was_left_out() -> None:
    tokenizer = Tokenizer(models.WordLevel({"ab": 0, "c": 1}, unk_token="c"))
    tokenizer.normalizer = normalizers.Replace(" ", "")
    joining = families.fast(tokenizer)
    assert not keeps_spaces(joining)
    assert byte_spans(joining, " ab")[1].tolist() == [[1, 3]]
    with pytest.raises(LossyTokenizationError, match="at byte 1 "):
        byte_spans(joining, "a b")

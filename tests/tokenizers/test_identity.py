"""Fingerprints and comparisons of tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kdlib.tokenizers import explain_difference, same_tokenizer, template_fingerprint, tokenizer_fingerprint
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer

GSM8K_LM = Path(__file__).parents[2] / "../shared/models/gsm8k-lm"


def unigram(score: float) -> PreTrainedTokenizerFast:
    model = models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", score)], unk_id=0)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model))


def test_fingerprint_survives_saving_use_and_another_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    tokenizer(["two", "four apples"], padding=True, truncation=True, max_length=4)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(tiny_tokenizer(chat_template=CHATML_TEMPLATE)) == before
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path),
        PreTrainedTokenizerFast.from_pretrained(tmp_path),
        PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")),
    ):
        assert tokenizer_fingerprint(loaded) == before
        assert same_tokenizer(loaded, tokenizer)


def test_fingerprint_of_a_trained_models_tokenizer(tmp_path: Path) -> None:
    if not GSM8K_LM.is_dir():
        pytest.skip(f"needs the model in {GSM8K_LM}")
    tokenizer = AutoTokenizer.from_pretrained(GSM8K_LM)
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(tiny_tokenizer())


def test_fingerprint_sees_tokens_merges_and_scores() -> None:
    added = tiny_tokenizer()
    added.add_tokens(["<think>"])
    smaller = tiny_tokenizer(vocab_size=300)
    prints = {tokenizer_fingerprint(t) for t in (tiny_tokenizer(), added, smaller, unigram(-2.0), unigram(-3.0))}
    assert len(prints) == 5


def test_fingerprint_sees_the_merges_of_one_vocabulary() -> None:
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
    merges = [("a", "b"), ("b", "c")]
    one, other = (
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab=vocabulary, merges=order)))
        for order in (merges, merges[::-1])
    )
    assert one.tokenize("abc") != other.tokenize("abc")
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    assert same_tokenizer(one, other)  # ids mean the same tokens, which is all that a teacher's ids need


def test_template_fingerprint_sees_all_that_reaches_the_template() -> None:
    def weather(city: str) -> str:
        """
        The weather.

        Args:
            city: where
        """
        return city

    plain, chatml = tiny_tokenizer(), tiny_tokenizer(chat_template=CHATML_TEMPLATE)
    prints = [
        template_fingerprint(plain),
        template_fingerprint(chatml),
        template_fingerprint(plain, chat_template_kwargs={"enable_thinking": False}),
        template_fingerprint(plain, tools=[weather]),
        template_fingerprint(plain, tools=[{"name": "weather"}]),
    ]
    assert len(set(prints)) == 5
    assert template_fingerprint(plain, chat_template_kwargs={}, tools=[]) == prints[0]
    options = {"a": 1, "b": 2}
    assert template_fingerprint(plain, chat_template_kwargs=options) == template_fingerprint(
        plain, chat_template_kwargs=dict(reversed(options.items()))
    )


def test_the_first_difference_is_explained() -> None:
    tokenizer, added = tiny_tokenizer(), tiny_tokenizer()
    size = len(tokenizer)
    added.add_tokens(["<think>"])
    assert not same_tokenizer(tokenizer, added)
    line = explain_difference(tokenizer, added)
    assert line == f"id {size} is nothing in one and '<think>' in the other (sizes {size} and {size + 1})"
    assert "id 0 is '<|pad|>' in one and '<unk>' in the other" in explain_difference(tokenizer, unigram(-2.0))
    assert explain_difference(tokenizer, tiny_tokenizer()) == f"the tokenizers have the same tokens (sizes {size} and {size})"

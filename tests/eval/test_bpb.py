"""Bits per byte against an independent float64 computation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kdlib.data.rows import prepare_dataset
from kdlib.eval import BitsPerByte, bits_per_byte, summary_rows
from tests.tiny import CHATML_TEMPLATE, tiny_llama, tiny_tokenizer

PAIRS = [
    {"prompt": "What is two plus two?", "completion": " The answer is four."},
    {"prompt": "Is the sky blue?", "completion": " Yes, the sky is blue (très bleu, 青い) on a clear day."},
    {"prompt": "How many?", "completion": " 7"},
]


@torch.no_grad()
def one_by_one(model: Any, tokenizer: Any, pairs: list[dict[str, str]]) -> tuple[list[float], list[int], int]:
    """Nats and bytes per row and the number of tokens: one unpadded float64 forward each."""
    wide, nats, sizes, tokens = model.double(), [], [], 0
    for pair in pairs:
        prompt = tokenizer.encode(pair["prompt"])
        whole = [*tokenizer.encode(pair["prompt"] + pair["completion"]), tokenizer.eos_token_id]
        logits = wide(torch.tensor([whole])).logits[0, :, : len(tokenizer)].tolist()
        row = 0.0
        for position in range(len(prompt), len(whole)):
            scores = [math.exp(x) for x in logits[position - 1]]
            row -= math.log(scores[whole[position]] / math.fsum(scores))
        nats.append(row)
        sizes.append(len(pair["completion"].encode("utf-8")))
        tokens += len(whole) - len(prompt)
    return nats, sizes, tokens


def test_value_error_and_counts() -> None:
    tokenizer = tiny_tokenizer()
    found = bits_per_byte(tiny_llama(384), PAIRS, tokenizer=tokenizer)
    nats, sizes, tokens = one_by_one(tiny_llama(384), tokenizer, PAIRS)
    ratio = sum(nats) / math.log(2) / sum(sizes)
    residual = sum((x / math.log(2) - ratio * b) ** 2 for x, b in zip(nats, sizes, strict=True))
    assert found.bits_per_byte == pytest.approx(ratio, rel=1e-6)
    assert found.stderr == pytest.approx(math.sqrt(residual * 3 / 2) / sum(sizes), rel=1e-5)
    assert found.high == pytest.approx(ratio + 1.96 * found.stderr, rel=1e-6)
    assert found.nats_per_token == pytest.approx(sum(nats) / tokens, rel=1e-6)
    assert (found.tokens, found.bytes, found.rows, found.truncated) == (tokens, sum(sizes), 3, 0)


def test_every_batch_size_gives_the_same() -> None:
    model, tokenizer = tiny_llama(384), tiny_tokenizer()
    found = [bits_per_byte(model, PAIRS * 3, tokenizer=tokenizer, batch_size=b) for b in (1, 2, 9)]
    assert found[1].bits_per_byte == pytest.approx(found[0].bits_per_byte, rel=1e-6)
    assert found[2].bits_per_byte == pytest.approx(found[0].bits_per_byte, rel=1e-6)
    assert len({(f.tokens, f.bytes) for f in found}) == 1


def test_rows_are_scored_in_chunks_too() -> None:
    """More positions than one chunk of logits holds, against the same text in a single float64 forward."""
    tokenizer, text = tiny_tokenizer(), "Is the sky blue? " * 60
    found = bits_per_byte(tiny_llama(384), [{"prompt": "?", "completion": text}], tokenizer=tokenizer)
    nats, sizes, tokens = one_by_one(tiny_llama(384), tokenizer, [{"prompt": "?", "completion": text}])
    assert tokens > 256
    assert found.bits_per_byte == pytest.approx(nats[0] / math.log(2) / sizes[0], rel=1e-6)
    assert found.stderr is None and found.low is None


def sentence_piece_like_tokenizer() -> PreTrainedTokenizerFast:
    """Unigram pieces with a mark for spaces, whose decoder drops the space in front of a text."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.UnigramTrainer(
        vocab_size=120,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    backend.train_from_iterator([f"{p['prompt']}{p['completion']}" for p in PAIRS] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def test_bytes_do_not_depend_on_the_tokenizer() -> None:
    first, second = tiny_tokenizer(), sentence_piece_like_tokenizer()
    found = [bits_per_byte(tiny_llama(len(t)), PAIRS, tokenizer=t, batch_size=2) for t in (first, second)]
    assert found[0].tokens != found[1].tokens
    assert found[0].bytes == found[1].bytes == sum(len(p["completion"].encode()) for p in PAIRS)


def test_every_assistant_turn_counts_and_no_other_text() -> None:
    tokenizer = tiny_tokenizer(chat_template=CHATML_TEMPLATE, eos_token="<|im_end|>")
    said = ["The answer is four.", "Seven apples, été."]
    messages = [
        {"role": "user", "content": "What is two plus two?"},
        {"role": "assistant", "content": said[0]},
        {"role": "user", "content": "How many apples are left?"},
        {"role": "assistant", "content": said[1]},
    ]
    found = bits_per_byte(tiny_llama(384), [{"messages": messages}], tokenizer=tokenizer)
    assert found.bytes == sum(len(text.encode()) for text in said)
    assert found.tokens == sum(len(tokenizer.encode(text)) + 1 for text in said)  # and the two ends of turn


def test_token_rows_text_rows_and_padded_vocabularies() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_llama(384)
    tokens = prepare_dataset(Dataset.from_list(PAIRS), tokenizer, max_length=512).dataset
    assert bits_per_byte(model, tokens, tokenizer=tokenizer) == bits_per_byte(model, PAIRS, tokenizer=tokenizer)
    padded = tiny_llama(400)
    padded.load_state_dict(
        {k: torch.cat([v, 9 * torch.ones(16, v.shape[1])]) if len(v) == 384 else v for k, v in model.state_dict().items()}
    )
    assert bits_per_byte(padded, PAIRS, tokenizer=tokenizer) == bits_per_byte(model, PAIRS, tokenizer=tokenizer)
    text = "The sky is blue."
    whole = bits_per_byte(model, [{"text": text}], tokenizer=tokenizer)
    first = tokenizer.decode(tokenizer.encode(text)[:1])
    assert whole.bytes == len(text) - len(first)  # this tokenizer puts nothing in front to predict it from
    assert bits_per_byte(model, [{"text": "<|bos|>" + text}], tokenizer=tokenizer).bytes == len(text)


def test_mode_is_restored_and_dropout_is_off() -> None:
    model, tokenizer = tiny_llama(384, attention_dropout=0.5).train(), tiny_tokenizer()
    found = [bits_per_byte(model, PAIRS, tokenizer=tokenizer) for _ in range(2)]
    assert model.training and found[0] == found[1]


def test_nothing_to_score_is_an_error_and_cut_rows_are_counted() -> None:
    model, tokenizer = tiny_llama(384), tiny_tokenizer()
    only_end = [{"input_ids": [5, 6, tokenizer.eos_token_id], "labels": [-100, -100, tokenizer.eos_token_id]}]
    with pytest.raises(ValueError, match="no text is scored"):
        bits_per_byte(model, only_end, tokenizer=tokenizer)
    assert bits_per_byte(model, PAIRS[:2], tokenizer=tokenizer, max_length=24).truncated == 1


def test_the_score_goes_into_tables() -> None:
    score = BitsPerByte(
        bits_per_byte=1.5,
        stderr=0.1,
        low=1.304,
        high=1.696,
        nats_per_token=3.0,
        tokens=9,
        bytes=18,
        rows=4,
        truncated=0,
    )
    (row,) = summary_rows(score.as_results(task="answers"))
    assert (row["task"], row["value"], row["n"], row["higher_is_better"]) == ("answers", 1.5, 4, False)
    assert (row["low"], row["high"]) == pytest.approx((score.low, score.high))

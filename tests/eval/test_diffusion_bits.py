"""A bound on bits per byte: the same tokens and bytes as bits_per_byte, and its nats those of the likelihoods."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kdlib.diffusion import DiffusionSpec, as_diffusion, spec_of, with_mask_token
from kdlib.eval import bits_per_byte, diffusion_bound
from kdlib.eval.diffusion_likelihood import Text, log_likelihoods
from tests.tiny import tiny_llama, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MASK = with_mask_token(TOKENIZER, "<|mask|>")
ROWS = [{"prompt": f"What is {i}? ", "completion": "It is two plus two, so four."} for i in range(4)]


def model() -> Any:
    return as_diffusion(tiny_llama(len(TOKENIZER)), DiffusionSpec(mask_token_id=MASK, eos_token_id=2)).eval()


def test_counts_are_those_of_bits_per_byte_and_nats_those_of_the_likelihoods() -> None:
    one, causal = model(), bits_per_byte(tiny_llama(len(TOKENIZER)), ROWS, tokenizer=TOKENIZER)
    found = diffusion_bound(one, ROWS, tokenizer=TOKENIZER, mc_samples=6, seed=3)
    assert (found.tokens, found.bytes, found.rows, found.truncated) == (causal.tokens, causal.bytes, 4, 0)
    texts = []
    for row in ROWS:
        prompt, whole = (TOKENIZER.encode(text) for text in (row["prompt"], row["prompt"] + row["completion"]))
        ids = [*whole, TOKENIZER.eos_token_id]
        texts.append(Text(ids=ids, scored=list(range(len(prompt), len(ids)))))
    nats = -log_likelihoods(one, texts, spec=spec_of(one.config), vocab_size=len(TOKENIZER), samples=6, seed=3)
    assert found.nats_per_token == pytest.approx(float(nats.sum()) / found.tokens, rel=1e-5)
    assert found.bits_per_byte == pytest.approx(float(nats.sum()) / math.log(2) / found.bytes, rel=1e-5)
    assert found.stderr is not None and found.low is not None and found.low < found.bits_per_byte and found.mc_samples == 6
    results = found.as_results(task="rows")
    assert results["results"]["rows"]["bits_per_byte_bound,none"] == found.bits_per_byte
    assert "bits_per_byte,none" not in results["results"]["rows"]


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="no diffusion language model that kdlib knows"):
        diffusion_bound(tiny_llama(len(TOKENIZER)), ROWS, tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="no text is scored"):
        diffusion_bound(model(), [{"input_ids": [1, 9, 2], "labels": [-100, -100, 2]}], tokenizer=TOKENIZER)

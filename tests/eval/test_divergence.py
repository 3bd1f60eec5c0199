"""Divergence from a teacher against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdlib.eval import kl_to_teacher
from tests.tiny import tiny_llama, tiny_tokenizer

PAIRS = [
    {"prompt": "What is two plus two?", "completion": " The answer is four."},
    {"prompt": "Is the sky blue?", "completion": " Yes, the sky is blue on a clear day, and at noon."},
]


def distributions(model: Any, tokenizer: Any, vocab: int) -> np.ndarray:
    """[N, vocab] log-probabilities at the scored positions, one unpadded float64 forward per row."""
    rows = []
    for pair in PAIRS:
        start = len(tokenizer.encode(pair["prompt"]))
        whole = [*tokenizer.encode(pair["prompt"] + pair["completion"]), tokenizer.eos_token_id]
        logits = model.double()(torch.tensor([whole])).logits[0, start - 1 : -1, :vocab].detach().numpy()
        rows.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    return np.concatenate(rows)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_against_numpy_with_padded_vocabularies(batch_size: int) -> None:
    tokenizer = tiny_tokenizer()
    student, teacher = tiny_llama(384, seed=1), tiny_llama(400, hidden=48, seed=2)
    found = kl_to_teacher(student, teacher, PAIRS, tokenizer=tokenizer, batch_size=batch_size)
    logq, logp = (distributions(model, tokenizer, len(tokenizer)) for model in (student, teacher))
    p, q = np.exp(logp), np.exp(logq)
    expected = {
        "kl_forward": (p * (logp - logq)).sum(-1).mean(),
        "kl_reverse": (q * (logq - logp)).sum(-1).mean(),
        "entropy_teacher": -(p * logp).sum(-1).mean(),
        "entropy_student": -(q * logq).sum(-1).mean(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).mean(),
        "acceptance": np.minimum(p, q).sum(-1).mean(),
        "acceptance_greedy": p[np.arange(len(p)), q.argmax(-1)].mean(),
        "tokens": len(p),
    }
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_model_does_not_diverge_from_itself() -> None:
    model = tiny_llama(384).train()
    found = kl_to_teacher(model, model, PAIRS, tokenizer=tiny_tokenizer())
    assert found["kl_forward"] == found["kl_reverse"] == 0.0
    assert found["top1_agreement"] == 1.0 and found["entropy_teacher"] == found["entropy_student"] > 0
    assert model.training


def test_a_smaller_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="one tokenizer"):
        kl_to_teacher(tiny_llama(300), tiny_llama(384), PAIRS, tokenizer=tiny_tokenizer())

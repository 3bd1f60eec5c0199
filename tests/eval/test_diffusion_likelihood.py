"""Monte-Carlo likelihoods against exact ones: one token, independent positions, all masks enumerated, block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from kdlib.diffusion import DiffusionSpec, spec_of
from kdlib.eval.diffusion_likelihood import Text, log_likelihoods
from kdlib.head import Head
from tests.eval.diffusion_models import MASK, enumerated, tiny_diffusion

V = 24
IDS = [1, 5, 9, 7, 3, 11, 4]


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def log_softmax(model: Any, ids: list[int], *, masked: list[int], **inputs: Any) -> torch.Tensor:
    noisy = torch.tensor([ids])
    noisy[0, masked] = MASK
    return model(input_ids=noisy, use_cache=False, **inputs).logits[0].double().log_softmax(-1)


def likelihoods(model: Any, texts: list[Text], **options: Any) -> torch.Tensor:
    return log_likelihoods(model, texts, spec=spec_of(model.config), vocab_size=V, **options)


@pytest.mark.parametrize("shift", [False, True])
def test_one_token_is_exact_with_one_sample(shift: bool) -> None:
    model = tiny_diffusion(V, shift=shift)
    texts = [Text(ids=IDS, scored=[6]), Text(ids=IDS[:4], scored=[2])]
    found = likelihoods(model, texts, samples=1, batch_size=2)
    expected = [
        log_softmax(model, text.ids, masked=text.scored)[text.scored[0] - shift, text.ids[text.scored[0]]] for text in texts
    ]
    assert found.numpy() == pytest.approx(np.array(expected), abs=1e-5)
    assert torch.allclose(found, likelihoods(model, texts, samples=64, batch_size=1), atol=1e-5)


@pytest.mark.parametrize("shift", [False, True])
def test_the_mean_is_the_bound_over_all_masks(shift: bool) -> None:
    model = tiny_diffusion(V, shift=shift)
    scored = [4, 5, 6]
    exact = enumerated(model, IDS, scored, spec=spec_of(model.config))
    found = [float(likelihoods(model, [Text(ids=IDS, scored=scored)], samples=3, seed=seed)) for seed in range(200)]
    error = np.std(found, ddof=1) / len(found) ** 0.5
    assert error > 0 and abs(np.mean(found) - exact) < 4 * error
    assert error < 0.02 * abs(exact)
    many = float(likelihoods(model, [Text(ids=IDS, scored=scored)], samples=3000, batch_size=500))
    assert many == pytest.approx(exact, rel=0.01)


def table_model() -> Any:
    """Positions that do not look at each other: the layers add nothing, a token's logits follow from its embedding alone."""
    model = tiny_diffusion(V)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    return model


def test_independent_positions_sum_their_log_probabilities() -> None:
    """Every mask of size k then says k / T of the sum in expectation; with T samples each size is drawn once."""
    model, scored = table_model(), [3, 4, 5, 6]
    logp = log_softmax(model, IDS, masked=scored)
    exact = sum(float(logp[i, IDS[i]]) for i in scored)
    found = [float(likelihoods(model, [Text(ids=IDS, scored=scored)], samples=4, seed=seed)) for seed in range(200)]
    assert np.mean(found) == pytest.approx(exact, abs=4 * np.std(found, ddof=1) / 200**0.5)
    same = [1, 5, 7, 7, 7, 7]  # equal tokens have equal log-probabilities there, so every draw is exact
    once = float(likelihoods(model, [Text(ids=same, scored=[2, 3, 4, 5])], samples=1))
    assert once == pytest.approx(4 * float(log_softmax(model, same, masked=[2])[2, 7]), abs=1e-5)


@pytest.mark.parametrize("blocks_from", ["response", "sequence"])
def test_blocks_are_predicted_behind_clean_ones(blocks_from: str) -> None:
    """Blocks of one token: the chain rule, exact with one sample; the oracle makes its own mask."""
    model = tiny_diffusion(V, attention="block_causal", block_length=1, blocks_from=blocks_from)
    prompt, total = 3, len(IDS)
    found = float(likelihoods(model, [Text(ids=IDS, scored=list(range(prompt, total)))], samples=1))
    exact = 0.0
    for i in range(prompt, total):
        seen = torch.zeros(1, 1, i + 1, i + 1, dtype=torch.bool)
        for q in range(i + 1):
            for k in range(i + 1):
                both_in_prompt = blocks_from == "response" and q < prompt and k < prompt
                seen[0, 0, q, k] = k <= q or both_in_prompt
        exact += float(log_softmax(model, IDS[: i + 1], masked=[i], attention_mask=seen)[i, IDS[i]])
    assert found == pytest.approx(exact, abs=1e-4)


def test_a_block_sees_what_is_clean_before_it_and_not_what_is_behind() -> None:
    """The last token's block of one is exact, whatever follows the text; the first block's bound does not know of it."""
    model = tiny_diffusion(V, attention="block_causal", block_length=2)
    found = float(likelihoods(model, [Text(ids=IDS[:6], scored=[3, 4, 5])], samples=400, batch_size=100))
    seen = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    seen[..., :3, 3:], seen[..., 3:5, 5:] = False, False
    exact = float(log_softmax(model, IDS[:6], masked=[5], attention_mask=seen)[5, IDS[5]])
    for masked, weight in (([3], 1.0), ([4], 1.0), ([3, 4], 1.0)):
        # E_k E_M of two tokens: half the time both, weight 1; else one of them, weight 2
        logp = log_softmax(model, IDS[:5], masked=masked, attention_mask=seen[..., :5, :5])
        exact += weight / 2 * sum(float(logp[i, IDS[i]]) for i in masked)
    assert found == pytest.approx(exact, rel=0.02)


def test_neither_batches_nor_neighbours_change_a_text() -> None:
    for attention in ("full", "block_causal"):
        model = tiny_diffusion(V, attention=attention, block_length=2)
        texts = [Text(ids=IDS[:n], scored=list(range(2, n))) for n in (4, 7, 5)]
        together = likelihoods(model, texts, samples=5, batch_size=4, seed=1)
        alone = [float(likelihoods(model, [text], samples=5, batch_size=1, seed=1)) for text in texts]
        assert together.numpy() == pytest.approx(np.array(alone), abs=1e-4)
        assert not torch.allclose(together, likelihoods(model, texts, samples=5, batch_size=4, seed=2))


def test_logits_of_masked_tokens_alone_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight samples of two tokens: four masks of one and four of both."""
    model, project, rows = tiny_diffusion(V), Head.project, []

    def watched(self: Head, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
        rows.append(len(hidden))
        return project(self, hidden, **options)

    monkeypatch.setattr(Head, "project", watched)
    likelihoods(model, [Text(ids=IDS, scored=[5, 6])], samples=8, batch_size=3)
    assert sum(rows) == 4 * 1 + 4 * 2 and len(rows) == 3


def test_what_cannot_be_scored_is_said() -> None:
    model = tiny_diffusion(V, shift=True)
    with pytest.raises(ValueError, match="text 0 begins with a scored token"):
        likelihoods(model, [Text(ids=IDS, scored=[0])])
    with pytest.raises(ValueError, match="text 0 has no scored tokens"):
        likelihoods(model, [Text(ids=IDS, scored=[])])
    with pytest.raises(ValueError, match="mc_samples must be at least 1, not 0"):
        likelihoods(model, [Text(ids=IDS, scored=[3])], samples=0)
    assert spec_of(model.config) == DiffusionSpec(mask_token_id=MASK, shift=True, eos_token_id=2)

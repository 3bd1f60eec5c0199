"""The checks pass what the target writes and fail what it does not."""

from __future__ import annotations

import math

import pytest
import torch

from kdlib.decoding.sampling import generate
from kdlib.eval.losslessness import GreedyCheck, check_greedy, check_sampling
from kdlib.types import SamplingParams
from tests.tiny import tiny_llama

PROMPTS = [[1, 5 + i, 9] for i in range(30)]
TARGET = tiny_llama(40, seed=0, eos_token_id=None)


def drawn(params: SamplingParams, *, seed: int = 0) -> list[list[int]]:
    found = generate(TARGET, PROMPTS, params, seeds=[seed * 1000 + i for i in range(len(PROMPTS))], pad_token_id=0)
    return [one.ids for one in found]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "top_p": 0.9}, {"top_k": 5}, {"temperature": 2.0}])
def test_draws_of_the_target_pass(options: dict) -> None:
    params = SamplingParams(max_tokens=24, **options)
    found = check_sampling(TARGET, PROMPTS, outputs=drawn(params), params=params)
    assert found.passed and abs(found.z) < 3 and found.outside == 0 and found.tokens == 30 * 24
    assert "FAILED" not in found.line


def test_z_is_that_of_a_slow_computation() -> None:
    params = SamplingParams(max_tokens=6, temperature=0.7, top_k=7)
    outputs = drawn(params)
    excess = variance = 0.0
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        for t, token in enumerate(output):
            with torch.no_grad():
                z = TARGET(torch.tensor([prompt + output[:t]])).logits[0, -1].double() / 0.7
            kept = z >= z.topk(7).values[-1]
            p = torch.where(kept, z.exp(), 0.0)
            p = p / p.sum()
            surprise = [-math.log(float(value)) for value in p[kept]]
            entropy = sum(float(v) * s for v, s in zip(p[kept], surprise, strict=True))
            excess += -math.log(float(p[token])) - entropy
            variance += sum(float(v) * (s - entropy) ** 2 for v, s in zip(p[kept], surprise, strict=True))
    found = check_sampling(TARGET, PROMPTS, outputs=outputs, params=params, batch_size=4)
    assert found.z == pytest.approx(excess / math.sqrt(variance), abs=1e-4)
    assert found.excess == pytest.approx(excess / (30 * 6), abs=1e-5)


@pytest.mark.parametrize("drawn_at", [0.7, 1.4])
def test_draws_at_another_temperature_fail(drawn_at: float) -> None:
    found = check_sampling(
        TARGET,
        PROMPTS,
        outputs=drawn(SamplingParams(max_tokens=24, temperature=drawn_at)),
        params=SamplingParams(max_tokens=24),
    )
    assert not found.passed and "FAILED" in found.line
    assert (found.z > 0) == (drawn_at > 1)


def test_tokens_that_the_filter_forbids_fail() -> None:
    found = check_sampling(
        TARGET,
        PROMPTS,
        outputs=drawn(SamplingParams(max_tokens=12)),
        params=SamplingParams(max_tokens=12, top_k=10),
    )
    assert found.outside > 10 and not found.passed and "outside" in found.line


def test_greedy_identity_and_its_first_difference() -> None:
    greedy = drawn(SamplingParams(max_tokens=10, temperature=0.0))
    assert check_greedy(TARGET, PROMPTS, outputs=greedy, expected=greedy).differences == ()
    changed = [list(row) for row in greedy]
    changed[4][6] = (changed[4][6] + 1) % 40
    changed[7] = changed[7][:5]
    found = check_greedy(TARGET, PROMPTS, outputs=changed, expected=greedy)
    with torch.no_grad():
        logits = TARGET(torch.tensor([PROMPTS[4] + greedy[4][:6]])).logits[0, -1]
    first, second = found.differences
    assert (first.prompt, first.position, found.identical) == (4, 6, 28)
    assert first.gap == pytest.approx(float(logits.max() - logits[changed[4][6]]), abs=1e-4)
    assert (second.prompt, second.position, second.gap) == (7, 5, math.inf)
    assert not found.passed and "28 of 30" in found.line and "FAILED" in found.line


def test_a_tie_within_rounding_passes_and_is_said() -> None:
    """Two equal rows of the head: which of the two tokens is greedy is for rounding to say."""
    model = tiny_llama(40, seed=0, eos_token_id=None, tie_word_embeddings=False)
    greedy = generate(model, PROMPTS[:1], SamplingParams(max_tokens=1, temperature=0.0), seeds=[0], pad_token_id=0)[0].ids
    other = (greedy[0] + 1) % 40
    with torch.no_grad():
        model.lm_head.weight[other] = model.lm_head.weight[greedy[0]]
    found = check_greedy(model, PROMPTS[:1], outputs=[[other]], expected=[greedy])
    assert found.passed and found.identical == 0 and "ties within rounding" in found.line


def test_sixteen_bit_targets_are_given_one_unit_in_the_last_place() -> None:
    model = tiny_llama(40, seed=0, eos_token_id=None).to(torch.bfloat16)
    greedy = generate(model, PROMPTS[:2], SamplingParams(max_tokens=3, temperature=0.0), seeds=[0, 1], pad_token_id=0)
    outputs = [list(one.ids) for one in greedy]
    outputs[0][0] = (outputs[0][0] + 1) % 40
    found = check_greedy(model, PROMPTS[:2], outputs=outputs, expected=[one.ids for one in greedy])
    with torch.no_grad():
        top = float(model(torch.tensor([PROMPTS[0]])).logits[0, -1].float().max())
    assert isinstance(found, GreedyCheck) and found.tolerance == pytest.approx(max(1.0, top) / 128, rel=0.02)

"""Expected acceptance against its definition, counted acceptance against the expectation, and what is refused."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kdlib.decoding.drafters import ModelDrafter
from kdlib.decoding.sampling import filtered_log_probs
from kdlib.eval import acceptance
from kdlib.eval.acceptance_expected import acceptance_probability
from kdlib.eval.acceptance_pair import decoding_of
from kdlib.eval.acceptance_prompts import prompt_set
from kdlib.eval.acceptance_timing import Best, Timing, measure_timing, pays_line
from kdlib.eval.costs import Costs
from kdlib.eval.scoring import scored_chunks
from kdlib.types import SamplingParams
from tests.tiny import tiny_llama, tiny_tokenizer

VOCAB = 40
PROMPTS = [[1, 5 + i, 9 + 2 * i, *range(10, 10 + i % 3)] for i in range(10)]


def params(**options: Any) -> SamplingParams:
    return SamplingParams(max_tokens=8, **options)


def logits(rows: int, size: int, *, seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def pair() -> tuple[Any, Any]:
    """A target without an end of text, and a draft that is near to it."""
    target = tiny_llama(VOCAB, seed=0, eos_token_id=None)
    draft = copy.deepcopy(target)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight += 0.05 * torch.randn(weight.shape, generator=generator)
    return target, draft


# --- the probability at one position


@given(st.integers(0, 50), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([0, 5]), st.sampled_from([1.0, 0.7]))
def test_probability_is_one_minus_total_variation(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    p, q = logits(4, 30, seed=seed), logits(4, 30, seed=seed + 1000)
    options = params(temperature=temperature, top_k=top_k, top_p=top_p)
    found = acceptance_probability(p, q, params=options)[:, 0]
    dense = [filtered_log_probs(side, options).double().exp() for side in (p, q)]
    torch.testing.assert_close(found.double(), 1 - 0.5 * (dense[0] - dense[1]).abs().sum(-1), atol=1e-6, rtol=0)


def test_probability_obeys_pinsker() -> None:
    p, q = logits(200, 12, seed=0), logits(200, 12, seed=0) + logits(200, 12, seed=1, scale=0.5)
    rejected = 1 - acceptance_probability(p, q, params=params())[:, 0]
    log = [side.double().log_softmax(-1) for side in (p, q)]
    kl = (log[0].exp() * (log[0] - log[1])).sum(-1)
    assert (rejected.double() <= (kl / 2).sqrt() + 1e-6).all() and (rejected > 0.5 * (kl / 2).sqrt()).any()


def test_equal_models_accept_everything_and_disjoint_ones_nothing() -> None:
    z = logits(50, 30, seed=3)
    assert acceptance_probability(z, z, params=params())[:, 0].sub(1).abs().max() < 1e-6
    left, right = z.clone(), z.clone()
    left[:, :15], right[:, 15:] = -torch.inf, -torch.inf
    assert acceptance_probability(left, right, params=params()).max() == 0


def test_top_p_cuts_both_sides() -> None:
    """p = (.5, .3, .2), q = (.2, .3, .5): at top_p 0.75 each loses its last token, which leaves the middle one in common."""
    p, q = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    found = acceptance_probability(p, q, params=params(top_p=0.75))
    torch.testing.assert_close(found, torch.tensor([[0.3 / 0.8, 0.0]]))
    torch.testing.assert_close(acceptance_probability(p, q, params=params()), torch.tensor([[0.7, 0.2]]))


def test_greedy_drafts_are_kept_with_the_targets_probability_of_the_argmax() -> None:
    p, q = logits(20, 9, seed=4), logits(20, 9, seed=5)
    found = acceptance_probability(p, q, params=params(temperature=0.5))[:, 1]
    expected = [float((row / 0.5).softmax(-1)[int(other.argmax())]) for row, other in zip(p, q, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_temperature_zero_asks_whether_the_argmaxes_agree() -> None:
    p, q = logits(60, 4, seed=6), logits(60, 4, seed=7)
    found = acceptance_probability(p, q, params=params(temperature=0.0))
    assert torch.equal(found[:, 0], (p.argmax(-1) == q.argmax(-1)).float()) and torch.equal(found[:, 0], found[:, 1])
    assert 0 < found.mean() < 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_smaller_draft_vocabulary_does_not_renormalise_the_target(temperature: float) -> None:
    p, q = logits(30, 20, seed=8), logits(30, 6, seed=9)
    ids = torch.tensor([3, 17, 0, 8, 9, 11])
    wide = torch.full((30, 20), -torch.inf)
    wide[:, ids] = q
    small = acceptance_probability(p, q, params=params(temperature=temperature), ids=ids)
    torch.testing.assert_close(small, acceptance_probability(p, wide, params=params(temperature=temperature)))
    prefix = torch.cat([q, torch.full((30, 14), -torch.inf)], -1)
    torch.testing.assert_close(
        acceptance_probability(p, q, params=params(temperature=temperature)),
        acceptance_probability(p, prefix, params=params(temperature=temperature)),
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("side", [0, 1])
def test_rows_that_are_not_finite_are_nan_in_both_columns(temperature: float, side: int) -> None:
    both = [logits(3, 5, seed=1), logits(3, 5, seed=2)]
    both[side][1, 2] = torch.nan
    found = acceptance_probability(*both, params=params(temperature=temperature))
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


# --- whole measurements


def slow_expectation(target: Any, draft: Any, prompt: list[int], response: list[int], *, temperature: float, top_p: float):
    """min(p, q) summed at each position, one prefix at a time, in float64 and plain Python."""
    values = []
    for t in range(len(response)):
        ids = torch.tensor([prompt + response[:t]])
        sides = []
        for model in (target, draft):
            with torch.no_grad():
                probs = (model(ids).logits[0, -1].double() / temperature).softmax(-1).tolist()
            mass, kept = 0.0, set()
            for index in sorted(range(len(probs)), key=lambda i: -probs[i]):
                if mass < top_p:
                    kept.add(index)
                mass += probs[index]
            total = sum(probs[i] for i in kept)
            sides.append([probs[i] / total if i in kept else 0.0 for i in range(len(probs))])
        p, q = sides
        values.append((sum(map(min, p, q)), p[q.index(max(q))]))
    return values


def test_expected_acceptance_equals_a_slow_computation_of_its_definition() -> None:
    target, draft = pair()
    found = acceptance(
        target, draft, PROMPTS, temperature=0.8, top_p=0.9, max_new_tokens=7, draft_sampling=(), timing=False, batch_size=3
    )
    slow = [
        slow_expectation(target, draft, prompt, response, temperature=0.8, top_p=0.9)
        for prompt, response in zip(PROMPTS, found.responses, strict=True)
    ]
    tokens = [value for row in slow for value in row]
    for column, way in enumerate(("probabilistic", "greedy")):
        values = [value[column] for value in tokens]
        assert found.expected[way].acceptance_rate.value == pytest.approx(sum(values) / len(values), abs=1e-5)
        curve = [part["acceptance_rate"] for part in found.expected[way].along_response]
        by_position = [sum(row[t][column] for row in slow) / len(slow) for t in range(7)]
        assert curve == pytest.approx(by_position, abs=1e-5)
    assert found.empirical == () and found.checks == ()


def test_the_rate_is_a_mean_over_tokens_and_not_over_prompts() -> None:
    """With an end of text, responses differ in length, and then the two differ."""
    target, draft = pair()
    stops = list(range(0, 16))
    found = acceptance(
        target, draft, PROMPTS, temperature=1.5, max_new_tokens=12, stop_ids=stops, draft_sampling=(), timing=False
    )
    assert len({len(response) for response in found.responses}) > 1
    expected = found.expected["probabilistic"]
    sums, counts = expected.sums.of, expected.sums.per
    assert counts.tolist() == [len(response) for response in found.responses]
    assert expected.acceptance_rate.value == pytest.approx(sums.sum() / counts.sum())
    assert expected.mean_over_prompts.value == pytest.approx((sums / counts).mean())
    assert abs(expected.mean_over_prompts.value - expected.acceptance_rate.value) > 1e-4


def test_counted_acceptance_agrees_with_the_expectation() -> None:
    """gamma = 1: the accepted share of rounds estimates the mean of sum min(p, q); over 120 prompts it is known narrowly."""
    target, draft = pair()
    prompts = [[1, 3 + i % 30, 4 + i // 30] for i in range(120)]
    found = acceptance(target, draft, prompts, gamma=1, temperature=1.0, max_new_tokens=12, batch_size=60, timing=False)
    assert found.passed and [one.draft_sample_method for one in found.empirical] == ["probabilistic", "greedy"]
    for one in found.empirical:
        rate, alpha = one.acceptance_rate, found.expected[one.draft_sample_method].acceptance_rate.value
        assert rate.low is not None and rate.high is not None and rate.high - rate.low < 0.1
        assert rate.low - 0.02 < alpha < rate.high + 0.02
        assert one.acceptance_length.value == pytest.approx(1 + one.acceptance_rate_per_position[0])
        assert one.iid_acceptance_length == pytest.approx(1 + alpha)
    assert found.expected["probabilistic"].acceptance_rate.value > found.expected["greedy"].acceptance_rate.value + 0.05


def test_the_target_as_its_own_draft() -> None:
    target, _ = pair()
    found = acceptance(target, target, PROMPTS, gamma=(2, 3), temperature=1.0, max_new_tokens=10, timing=False)
    assert found.expected["probabilistic"].acceptance_rate.value == pytest.approx(1.0, abs=1e-5)
    for one in found.empirical[:2]:
        assert one.acceptance_length.value == one.num_speculative_tokens + 1
        assert one.conditional_acceptance_rate_per_position == [1.0] * one.num_speculative_tokens
        assert one.acceptance_rate.value == 1.0
    assert found.empirical[2].acceptance_rate.value < 0.9  # greedy drafts of a sampling target


def test_greedy_requests_have_one_way_of_drafting_and_identical_output() -> None:
    target, draft = pair()
    found = acceptance(target, draft, PROMPTS, gamma=3, max_new_tokens=16, timing=False, batch_size=4)
    assert list(found.expected) == ["greedy"] and len(found.empirical) == 1
    assert found.empirical[0].outputs == found.responses
    assert found.passed and found.checks[0].to_json()["identical"] == len(PROMPTS)
    rates = found.empirical[0].acceptance_rate_per_position
    conditional = found.empirical[0].conditional_acceptance_rate_per_position
    assert rates == sorted(rates, reverse=True) and 0 < rates[-1] < rates[0] < 1
    assert rates == pytest.approx([math.prod(conditional[: i + 1]) for i in range(3)])


def test_a_drafter_with_a_scorer_is_measured_as_its_model_is() -> None:
    target, draft = pair()
    options: dict[str, Any] = {"gamma": 2, "temperature": 1.0, "max_new_tokens": 6}

    def scorer(rows: Any) -> Any:
        return scored_chunks([target, draft], rows, vocab_size=VOCAB, batch_size=2, desc="")

    plain = acceptance(target, draft, PROMPTS[:4], timing=False, **options)
    other = acceptance(target, ModelDrafter(draft), PROMPTS[:4], scorer=scorer, timing_prompts=1, **options)
    assert [one.outputs for one in other.empirical] == [one.outputs for one in plain.empirical]
    assert other.expected["greedy"].sums.of == pytest.approx(plain.expected["greedy"].sums.of, abs=1e-5)
    assert other.timing is not None and other.timing.costs is None and other.timing.best == {}
    assert other.to_json()["draft"] == "ModelDrafter"
    with pytest.raises(ValueError, match="give its logits with scorer="):
        acceptance(target, ModelDrafter(draft), PROMPTS[:4], **options)


def test_batches_do_not_change_what_is_measured() -> None:
    target, draft = pair()
    runs = [
        acceptance(target, draft, PROMPTS, gamma=2, temperature=1.0, max_new_tokens=6, batch_size=size, timing=False)
        for size in (1, 4)
    ]
    assert runs[0].responses == runs[1].responses
    assert [one.outputs for one in runs[0].empirical] == [one.outputs for one in runs[1].empirical]
    again = acceptance(
        target, draft, PROMPTS, gamma=2, temperature=1.0, max_new_tokens=6, timing=False, responses=runs[0].responses
    )
    assert again.expected["greedy"].acceptance_rate.value == pytest.approx(
        runs[0].expected["greedy"].acceptance_rate.value, abs=1e-6
    )


def test_positions_without_finite_logits_are_dropped_and_counted() -> None:
    target, draft = pair()
    with torch.no_grad():
        draft.get_input_embeddings().weight[7] = torch.nan
    prompts = [[1, 3, 4], [1, 7, 4]]  # the second prompt's positions are all NaN for the draft
    found = acceptance(target, draft, prompts, temperature=0.0, max_new_tokens=4, draft_sampling=(), timing=False)
    assert 7 not in found.responses[0]
    assert found.expected["greedy"].dropped == 4 and found.expected["greedy"].tokens == 4


def test_texts_domains_and_json(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    models = [tiny_llama(len(tokenizer), seed=seed) for seed in (0, 1)]
    rows = [
        {"question_id": 0, "category": "writing", "turns": ["What is blue?", "And green?"]},
        {"question_id": 1, "category": "", "turns": ["How many apples?"]},
        {"question_id": 2, "category": "math", "turns": ["What is two plus two?"]},
        {"question_id": 3, "category": "math", "turns": ["What is two plus two?"]},
    ]
    found = acceptance(*models, rows, tokenizer=tokenizer, gamma=2, max_new_tokens=5, timing_prompts=1)
    content = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert content["prompts"] == 3 and content["domains"] == {"writing": 1, "math": 1}
    assert content["prompts_left_out"] == {"a prompt that an earlier row has": 1}
    assert set(content["expected"]["greedy"]["by_domain"]) == {"writing", "math"}
    run = content["empirical"][0]
    assert run["num_accepted_tokens"] <= run["num_draft_tokens"] <= 2 * run["num_drafts"]
    assert content["timing"]["costs"]["c"] > 0 and content["timing"]["best"]["greedy"]["num_speculative_tokens"] >= 1
    assert content["checks"][0]["check"] == "greedy_identity" and content["checks"][0]["num_speculative_tokens"] == 2
    asked = prompt_set(["What is blue?"], tokenizer=tokenizer, longest=100)
    assert asked.ids[0] == found.prompts.ids[0]  # the first turn, in the chat template


# --- timing


def costs(*, c: float) -> Costs:
    verify = {gamma: 1.0 + 0.02 * gamma for gamma in range(1, 9)}
    return Costs(target_step=1.0, draft_step=c, verify=verify, context=10, batch_size=1, repeats=20)


@pytest.mark.parametrize(
    ("best", "c", "said"),
    [
        (Best(num_speculative_tokens=1, predicted_speedup=0.7, acceptance_rate=0.4), 0.5, "no gamma pays, a draft step costs"),
        (Best(num_speculative_tokens=1, predicted_speedup=0.99, acceptance_rate=0.4), 0.39, "is predicted at 0.99x"),
        (Best(num_speculative_tokens=4, predicted_speedup=2.1, acceptance_rate=0.8), 0.1, "predicted best, 2.10x"),
    ],
)
def test_the_verdict_on_gamma(best: Best, c: float, said: str) -> None:
    timing = Timing(prompts=1, target_tokens_per_second=1.0, speeds=(), costs=costs(c=c), best={"greedy": best})
    assert said in pays_line(timing, method="greedy")


def test_timing_counts_total_tokens_over_total_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that ticks once a reading, every timed run takes a second."""
    target, draft = pair()
    found = acceptance(target, draft, PROMPTS[:3], gamma=2, max_new_tokens=6, timing=False)
    ticks = iter(range(10**6))
    monkeypatch.setattr("kdlib.eval.acceptance_timing.time.perf_counter", lambda: float(next(ticks)))
    decoding = decoding_of(target, draft, params(temperature=0.0))
    timing = measure_timing(
        decoding, PROMPTS[:3], keys=[0, 1, 2], decoded=found.empirical, alphas={"greedy": 0.5}, response_length=6
    )
    assert timing.target_tokens_per_second == 8.0  # three prompts of max_tokens 8 in three ticks
    assert timing.speeds[0].measured_speedup == 1.0 and timing.costs is not None
    predicted = found.empirical[0].acceptance_length.value / (2 * timing.costs.c + timing.costs.v[2])
    assert timing.speeds[0].predicted_speedup == pytest.approx(predicted)
    assert timing.speeds[0].model_error == pytest.approx(predicted - 1)


# --- what is refused


def test_bad_input_is_refused_with_the_fix(tmp_path: Path) -> None:
    target, draft = pair()
    for gamma in (0, [2, 0], []):
        with pytest.raises(ValueError, match="at least 1"):
            acceptance(target, draft, PROMPTS, gamma=gamma)
    with pytest.raises(ValueError, match="there are no prompts"):
        acceptance(target, draft, [])
    with pytest.raises(ValueError, match="prompt 1 has 500 tokens"):
        acceptance(target, draft, [[1], [1] * 500], max_new_tokens=20)
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        acceptance(target, draft, [[1]], max_new_tokens=512)
    with pytest.raises(ValueError, match="the draft has 48 tokens and the target 40"):
        acceptance(target, tiny_llama(48), PROMPTS)
    with pytest.raises(ValueError, match="add the tokenizer="):
        acceptance(target, tiny_llama(32), PROMPTS)
    with pytest.raises(ValueError, match="'lucky'"):
        acceptance(target, draft, PROMPTS, draft_sampling=("lucky",))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need a tokenizer"):
        acceptance(target, draft, ["a text"])


def test_different_tokenizers_are_refused_with_the_first_difference(tmp_path: Path) -> None:
    for name, tokenizer in (("target", tiny_tokenizer()), ("draft", tiny_tokenizer(vocab_size=340))):
        tokenizer.save_pretrained(tmp_path / name)
        tiny_llama(len(tokenizer)).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match=r"different tokenizers .*id 340 is .* in one and nothing in the other"):
        acceptance(str(tmp_path / "target"), str(tmp_path / "draft"), ["a text"])

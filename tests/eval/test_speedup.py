"""The wall-time model against a simulation of rounds, its limits and inverse; costs of passes as they are measured."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel

from kdlib.eval.costs import Costs, measure_costs
from kdlib.eval.speedup import acceptance_length_of, best_gamma, break_even_acceptance, iid_acceptance_length, speedup
from tests.tiny import tiny_llama

ROUNDS = 200_000


def simulated_rounds(rates: list[float]) -> np.ndarray:
    """Tokens of each round when position i is accepted with rates[i], drawn token by token; seeded."""
    accepted = np.random.default_rng(0).random((ROUNDS, len(rates))) < np.array(rates)
    return 1 + np.where(accepted.all(1), len(rates), (~accepted).argmax(1))  # up to the first refusal, and the target's own


@pytest.mark.parametrize(("alpha", "gamma"), [(0.2, 1), (0.5, 3), (0.8, 5), (0.95, 8)])
def test_iid_acceptance_length_is_that_of_simulated_rounds(alpha: float, gamma: int) -> None:
    rounds = simulated_rounds([alpha] * gamma)
    error = rounds.std() / np.sqrt(ROUNDS)
    assert iid_acceptance_length(alpha, gamma=gamma) == pytest.approx(rounds.mean(), abs=4 * error)
    assert iid_acceptance_length(alpha, gamma=gamma) == pytest.approx((1 - alpha ** (gamma + 1)) / (1 - alpha), rel=1e-12)


def test_acceptance_length_of_unequal_rates_is_that_of_simulated_rounds() -> None:
    rates = [0.9, 0.6, 0.75, 0.3]
    rounds = simulated_rounds(rates)
    assert acceptance_length_of(rates) == pytest.approx(rounds.mean(), abs=4 * rounds.std() / np.sqrt(ROUNDS))
    assert acceptance_length_of([]) == 1.0


def test_speedup_is_the_ratio_of_two_simulated_clocks() -> None:
    rounds, gamma, c, v = simulated_rounds([0.7] * 4), 4, 0.15, 1.2
    with_draft = sum(gamma * c + v for _ in rounds)
    target_alone = float(rounds.sum())  # one unit a token
    assert speedup(rounds.mean(), gamma=gamma, c=c, v=v) == pytest.approx(target_alone / with_draft, rel=1e-9)


def test_limits() -> None:
    assert iid_acceptance_length(0.0, gamma=5) == 1.0
    assert iid_acceptance_length(1.0, gamma=5) == 6.0
    assert speedup(iid_acceptance_length(0.0, gamma=5), gamma=5, c=0.2, v=1.5) == pytest.approx(1 / (5 * 0.2 + 1.5))


@given(c=st.floats(0.0, 1.5), v=st.floats(0.5, 4.0), gamma=st.integers(1, 12))
def test_break_even_is_where_the_speedup_is_one(c: float, v: float, gamma: int) -> None:
    def fast(alpha: float) -> float:
        return speedup(iid_acceptance_length(alpha, gamma=gamma), gamma=gamma, c=c, v=v)

    alpha = break_even_acceptance(c=c, v=v, gamma=gamma)
    if alpha is None:
        assert fast(1.0) < 1.0
    elif alpha == 0.0:
        assert fast(0.0) >= 1.0 - 1e-9
    else:
        assert 0.0 < alpha <= 1.0 and fast(alpha) == pytest.approx(1.0, abs=1e-6)


def test_with_free_verification_one_drafted_token_pays_above_c() -> None:
    """Leviathan et al., corollary 3.9: some gamma helps if and only if alpha > c; and gamma = 1 then does."""
    assert break_even_acceptance(c=0.3, v=1.0, gamma=1) == pytest.approx(0.3)
    assert break_even_acceptance(c=1.2, v=1.0, gamma=1) is None


def test_best_gamma_is_the_fastest_of_those_given() -> None:
    v = {1: 1.0, 2: 1.1, 3: 1.2, 4: 3.0}
    speeds = {gamma: speedup(iid_acceptance_length(0.8, gamma=gamma), gamma=gamma, c=0.1, v=v[gamma]) for gamma in v}
    gamma, value = best_gamma(0.8, c=0.1, v=v, gammas=v)
    assert (gamma, value) == (max(speeds, key=lambda g: speeds[g]), max(speeds.values())) and gamma == 3
    assert best_gamma(0.8, c=0.1, v=lambda gamma: v[gamma], gammas=v) == (gamma, value)
    assert best_gamma(0.0, c=0.0, v=lambda gamma: 1.0, gammas=[4, 2, 3])[0] == 2


def windowed() -> PreTrainedModel:
    """A model whose cache drops what leaves a window of 8 tokens."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MistralConfig(vocab_size=64, num_hidden_layers=2, sliding_window=8, max_position_embeddings=64, **sizes)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("make_draft", [lambda: tiny_llama(64, layers=1), windowed])
def test_costs_are_positive_and_leave_the_models_alone(make_draft: type) -> None:
    target, draft = tiny_llama(64).train(), make_draft().train()
    target.model.layers[1].eval()
    modes = [[module.training for module in model.modules()] for model in (target, draft)]
    weights = [p.detach().clone() for model in (target, draft) for p in model.parameters()]
    costs = measure_costs(target, draft, gammas=[2, 5], context=20, batch_size=3, repeats=4)
    assert costs.target_step > 0 and costs.draft_step > 0 and set(costs.verify) == {2, 5} and min(costs.verify.values()) > 0
    assert (costs.context, costs.batch_size, costs.repeats) == (20, 3, 4)
    assert modes == [[module.training for module in model.modules()] for model in (target, draft)]
    for before, after in zip(weights, (p for model in (target, draft) for p in model.parameters()), strict=True):
        assert torch.equal(before, after) and after.grad is None


def test_every_pass_is_made_at_the_context_asked_for() -> None:
    """What the passes are given: lengths read from the models themselves."""
    target, draft = tiny_llama(64), tiny_llama(64, layers=1)
    seen: dict[str, set[tuple[int, int]]] = {"target": set(), "draft": set()}
    for name, model in (("target", target), ("draft", draft)):
        model.register_forward_pre_hook(
            lambda _, args, given, name=name: seen[name].add(
                (given["past_key_values"].get_seq_length(), given["input_ids"].shape[1])
            ),
            with_kwargs=True,
        )
    measure_costs(target, draft, gammas=[2, 3], context=20, repeats=2)
    steps = {(20 + step, 1) for step in range(3)}  # max(gammas) steps in a row
    assert seen["target"] == {(0, 20), (20, 3), (20, 4)} | steps
    assert seen["draft"] == {(0, 20)} | steps


def test_costs_are_ratios_to_the_targets_step() -> None:
    costs = Costs(target_step=0.02, draft_step=0.005, verify={3: 0.03}, context=1, batch_size=1, repeats=1)
    assert costs.c == pytest.approx(0.25) and costs.v == {3: pytest.approx(1.5)}


def test_a_context_that_does_not_fit_is_refused() -> None:
    model = tiny_llama(64, max_position_embeddings=32)
    with pytest.raises(ValueError, match="context of 30 tokens cannot be timed: it is at least 1 and at most 27"):
        measure_costs(model, model, gammas=[4], context=30)
    with pytest.raises(ValueError, match="at least 1"):
        measure_costs(model, model, gammas=[0], context=4)

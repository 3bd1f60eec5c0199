"""TAID's schedule and state: what is saved in checkpoints and how it moves."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.objectives import TAID, CrossEntropy, ForwardKL, Interpolated, Sum
from tests.objectives.cases import logits


def schedule(objective: TAID, losses: list[float], *, max_steps: int) -> list[float]:
    """t before the first step and after each."""
    state = objective.init_state(max_steps)
    seen = [state["t"]]
    for step, loss in enumerate(losses, start=1):
        state = objective.update(state, loss, step)
        seen.append(state["t"])
    return seen


def test_a_schedule_worked_by_hand() -> None:
    objective = TAID(t_start=0.2, t_end=1.0, alpha=0.5, momentum=0.9)
    # step 1 has nothing to compare with: the linear 0.2 + 0.8 / 10
    # step 2: r = 0.25, m = 0.025, sigmoid 0.50625, t = 0.28 + 0.5 * 0.50625 * 0.72
    # step 3: r = -0.2, m = 0.9 * 0.025 - 0.1 * 0.2 = 0.0025
    # step 4: r = 0.95, m = 0.9 * 0.0025 + 0.1 * 0.95 = 0.09725
    found = schedule(objective, [2.0, 1.5, 1.8, 0.09], max_steps=10)
    assert found == pytest.approx([0.2, 0.28, 0.462249, 0.596855, 0.702538], abs=1e-6)


def test_without_alpha_the_schedule_is_linear() -> None:
    found = schedule(TAID(t_start=0.4, t_end=0.9, alpha=0.0), [3.0, 1.0, 2.0, 2.5, 0.1], max_steps=5)
    assert found == pytest.approx([0.4, 0.5, 0.6, 0.7, 0.8, 0.9])


@settings(max_examples=100, deadline=None)
@given(
    losses=st.lists(st.floats(0.0, math.inf), min_size=1, max_size=30),
    start=st.floats(0.0, 1.0),
    alpha=st.floats(0.0, 1.0),
)
def test_t_never_falls_never_lags_the_line_and_stays_below_its_end(losses: list[float], start: float, alpha: float) -> None:
    objective = TAID(t_start=start, t_end=1.0, alpha=alpha)
    found = schedule(objective, losses, max_steps=len(losses))
    for step, (before, after) in enumerate(pairwise(found), start=1):
        assert before <= after <= 1.0
        assert after >= start + (1.0 - start) * step / len(losses) - 1e-12
    assert found[-1] == pytest.approx(1.0)


def test_a_loss_of_zero_or_infinity_does_not_sink_the_momentum() -> None:
    objective, calm = TAID(t_start=0.0), 0.5
    state = objective.init_state(1000)
    for step, loss in enumerate([0.0, 1.0, math.inf, 1.0, calm, calm], start=1):
        state = objective.update(state, loss, step)
    assert abs(state["momentum"]) < 0.03


def test_a_falling_loss_raises_t_faster_than_a_rising_one() -> None:
    objective = TAID(alpha=0.1, momentum=0.0)
    falling, rising = [4.0, 3.0, 2.0, 1.0], [1.0, 2.0, 3.0, 4.0]
    assert schedule(objective, falling, max_steps=100)[-1] > schedule(objective, rising, max_steps=100)[-1]


def test_updates_leave_the_old_state_alone_and_survive_json() -> None:
    objective = TAID(alpha=0.2)
    state = objective.update(objective.init_state(10), 2.0, 1)
    before = dict(state)
    after = objective.update(state, 1.0, 2)
    assert state == before != after
    assert objective.update(json.loads(json.dumps(state)), 1.0, 2) == after


def test_bind_gives_the_interpolation_of_the_moment_with_the_same_options() -> None:
    objective = TAID(temperature=2.0, t_squared=True)
    assert objective.bind({**objective.init_state(10), "t": 0.7}) == Interpolated(t=0.7, temperature=2.0, t_squared=True)
    student, teacher, _ = logits(3)
    unbound, bound = (o.on_logits(student, teacher).sum for o in (objective, objective.bind(objective.init_state())))
    assert unbound == bound


def test_the_ends_of_the_interpolation() -> None:
    student, teacher, _ = logits(3)
    student.requires_grad_()
    at_student, at_teacher = (Interpolated(t=t).on_logits(student, teacher).sum for t in (0.0, 1.0))
    at_student.backward()
    assert at_student.item() == pytest.approx(0.0, abs=1e-12)
    assert student.grad is not None and student.grad.abs().max() < 1e-12
    assert at_teacher.item() == ForwardKL().on_logits(student, teacher).sum.item()


def test_a_sum_keeps_the_state_of_its_parts_apart() -> None:
    fast, slow = TAID(alpha=0.5), TAID(alpha=0.0, t_start=0.1)
    objective = Sum(parts=((0.5, fast), (0.3, CrossEntropy()), (0.2, slow)))
    state = objective.init_state(10)
    alone = [part.init_state(10) for part in (fast, slow)]
    for step, loss in enumerate([2.0, 1.0, 1.5], start=1):
        state = json.loads(json.dumps(objective.update(state, loss, step)))
        alone = [part.update(own, loss, step) for part, own in zip((fast, slow), alone, strict=True)]
    bound = objective.bind(state)
    assert [part for _, part in bound.parts] == [fast.bind(alone[0]), CrossEntropy(), slow.bind(alone[1])]
    assert [weight for weight, _ in bound.parts] == [0.5, 0.3, 0.2]


def test_objectives_without_a_schedule_have_no_state() -> None:
    for objective in (ForwardKL(), Sum(parts=((1.0, ForwardKL()),))):
        assert objective.init_state(10) == {}
        assert objective.update({}, 1.0, 1) == {}
        assert objective.bind({}) == objective


@pytest.mark.parametrize("wrong", [{"t_start": -0.1}, {"t_start": 0.9, "t_end": 0.5}, {"t_end": 1.1}])
def test_a_schedule_outside_0_to_1_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="TAID needs 0 <= t_start <= t_end <= 1"):
        replace(TAID(), **wrong)


@pytest.mark.parametrize("wrong", [{"alpha": -0.1}, {"momentum": 1.0}, {"momentum": -0.5}])
def test_a_schedule_that_could_fall_or_never_learn_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="TAID needs alpha >= 0 and 0 <= momentum < 1"):
        replace(TAID(), **wrong)

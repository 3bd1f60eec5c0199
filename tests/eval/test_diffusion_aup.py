"""AUP against a calculation by hand, and the published points of d3LLM's leaderboard."""

from __future__ import annotations

import math

import pytest

from kdlib.eval.diffusion_aup import aup


def test_by_hand() -> None:
    """72 at 1, 75 at 3, 60 at 9 (dropped: below 72 - 5), 70 at 6; the best of all methods has 80."""
    w = {y: math.exp(-3 * (1 - y / 80)) for y in (72, 75, 70)}
    expected = 72.0 + 2 * (72 * w[72] + 75 * w[75]) / 2 + 3 * (75 * w[75] + 70 * w[70]) / 2
    assert aup([(9.0, 60.0), (3.0, 75.0), (1.0, 72.0), (6.0, 70.0)], best=80.0) == pytest.approx(expected)


def test_accuracy_above_the_best_weighs_one() -> None:
    assert aup([(1.0, 50.0), (2.0, 60.0)], best=50.0) == pytest.approx(50.0 + (50.0 + 60.0) / 2)


def test_exactly_five_points_below_is_kept() -> None:
    assert aup([(1.0, 50.0), (2.0, 45.0)], best=50.0) > aup([(1.0, 50.0), (2.0, 44.9)], best=50.0) == 50.0


def test_one_point_is_its_rectangle() -> None:
    assert aup([(1.0, 72.5)], best=90.0) == 72.5
    assert aup([(2.0, 0.0)], best=0.0) == 0.0


def test_a_curve_needs_points() -> None:
    with pytest.raises(ValueError, match="without points"):
        aup([], best=80.0)

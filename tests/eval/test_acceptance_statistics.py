"""Bootstrap intervals over prompts cover the truth as often as they say, and see that tokens of a prompt hang together."""

from __future__ import annotations

import numpy as np
import pytest

from kdlib.eval.acceptance_statistics import ratio, ratio_change, sums


def measurement(rng: np.random.Generator, *, prompts: int, alpha: float, shared: float = 0.0):
    """Accepted and drafted tokens per prompt; ``shared`` is the spread of a prompt's own rate around ``alpha``."""
    drafted = rng.integers(20, 60, size=prompts)
    rates = np.clip(alpha + shared * rng.uniform(-1, 1, size=prompts), 0, 1)
    return sums(rng.binomial(drafted, rates), drafted)


@pytest.mark.parametrize("shared", [0.0, 0.2])
def test_intervals_cover_the_truth_about_95_times_in_100(shared: float) -> None:
    rng = np.random.default_rng(0)
    found = [ratio(measurement(rng, prompts=60, alpha=0.7, shared=shared), resamples=500, seed=trial) for trial in range(300)]
    covered = np.mean([one.low <= 0.7 <= one.high for one in found])
    assert 0.90 <= covered <= 0.98


def test_prompts_that_differ_widen_the_interval() -> None:
    widths = []
    for shared in (0.0, 0.3):
        found = ratio(measurement(np.random.default_rng(1), prompts=80, alpha=0.6, shared=shared), resamples=1000, seed=0)
        widths.append(found.high - found.low)
    assert widths[1] > 2 * widths[0]


def test_ratio_is_of_sums_and_leaves_out_prompts_that_say_nothing() -> None:
    found = ratio(sums([1, 30, 0], [10, 40, 0]), resamples=100, seed=0, plus=1.0)
    assert found.value == pytest.approx(1 + 31 / 50)
    assert (found.low, found.high) == pytest.approx((1.1, 1.75))  # the two prompts' own ratios
    assert ratio(sums([3], [4]), resamples=100, seed=0).low is None
    with pytest.raises(ValueError, match="nothing to average"):
        ratio(sums([0], [0]), resamples=100, seed=0)


def test_the_same_seed_gives_the_same_interval() -> None:
    data = measurement(np.random.default_rng(2), prompts=30, alpha=0.5)
    assert ratio(data, resamples=200, seed=3) == ratio(data, resamples=200, seed=3) != ratio(data, resamples=200, seed=4)


def test_change_is_paired() -> None:
    """Every prompt gains 10%: however much prompts differ, the change is sure. Unpaired intervals would overlap."""
    rng = np.random.default_rng(3)
    drafted = np.full(40, 100.0)
    before = sums(rng.uniform(20, 80, size=40), drafted)
    after = sums(before.of * 1.1, drafted)
    found = ratio_change(after, before, resamples=500, seed=0)
    assert (found.value, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert ratio(after, resamples=500, seed=0).low < ratio(before, resamples=500, seed=0).high
    lengths = ratio_change(after, before, resamples=500, seed=0, plus=1.0)
    assert lengths.value == pytest.approx((100 + after.of.mean()) / (100 + before.of.mean()) - 1)


def test_a_change_from_nothing_has_no_bounds() -> None:
    nothing, something = sums([0, 0, 0], [5, 5, 5]), sums([1, 2, 3], [5, 5, 5])
    found = ratio_change(something, nothing, resamples=50, seed=0)
    assert found.to_json() == {"value": None, "low": None, "high": None}
    rare = ratio_change(something, sums([0, 0, 1], [5, 5, 5]), resamples=200, seed=0)  # some resamples have none before
    assert rare.value == pytest.approx(5.0) and rare.high is None
    assert ratio_change(something, nothing, resamples=50, seed=0, plus=1.0).value == pytest.approx(0.4)

"""When the alarm of teacher hacking fires, on made-up evaluations whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kdlib.eval.hacking import Look, alarm_text, judge, read_looks, write_looks
from kdlib.eval.hacking_report import golden_line, golden_section

ROWS = 80
PER = [40.0] * ROWS


def looks(values: list[float], *, noise: float = 0.0, seed: int = 0) -> list[Look]:
    """One evaluation every 10 steps; rows differ among each other, and from look to look by ``noise`` a row."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(40.0, 10.0, ROWS)
    return [
        Look(step=10 * (i + 1), nats=(rows + 40.0 * value + rng.normal(0.0, noise, ROWS)).tolist())
        for i, value in enumerate(values)
    ]


def falling(steps: int, *, noise: float = 0.01, seed: int = 0) -> list[tuple[int, float]]:
    rng = np.random.default_rng(seed)
    return [(step, 2.0 - 0.01 * step + float(rng.normal(0.0, noise))) for step in range(1, steps + 1)]


def flat(steps: int, *, seed: int = 0) -> list[tuple[int, float]]:
    rng = np.random.default_rng(seed)
    return [(step, 1.0 + float(rng.normal(0.0, 0.05))) for step in range(1, steps + 1)]


HACKED = [0.5, 0.4, 0.3, 0.35, 0.4, 0.45, 0.48, 0.5]


def test_the_alarm_fires_when_the_loss_falls_and_the_metric_rises() -> None:
    verdict = judge(looks(HACKED, noise=1.0), PER, losses=falling(80))
    assert verdict.alarm and verdict.best_step == 30 and verdict.step == 80
    assert verdict.rise.value == pytest.approx(0.2, abs=0.02)
    assert verdict.rise.low is not None and verdict.rise.high is not None and verdict.rise.low < 0.2 < verdict.rise.high
    assert "since step 30" in alarm_text(verdict, unit="byte") and "nats per byte" in alarm_text(verdict, unit="byte")


def test_a_rise_by_less_than_the_noise_of_the_text_is_none() -> None:
    """Paired over rows: the rows' own spread of 10 nats does not hide a rise, and does not make one."""
    values = [0.3, 0.302, 0.304, 0.306, 0.308, 0.31]
    assert judge(looks(values, noise=0.01), PER, losses=falling(60)).alarm
    shaken = judge(looks(values, noise=10.0), PER, losses=falling(60))
    assert not shaken.alarm and shaken.rise.low is not None and shaken.rise.low < 0


def test_a_rise_that_goes_back_and_forth_is_the_noise_of_training() -> None:
    verdict = judge(looks([0.3, 0.33, 0.31, 0.34, 0.32, 0.32, 0.33]), PER, losses=falling(70))
    assert not verdict.alarm and verdict.rise.low is not None and verdict.rise.low > 0


def test_no_alarm_while_the_metric_falls_too_or_the_loss_does_not() -> None:
    assert not judge(looks([0.7, 0.6, 0.5, 0.4, 0.3, 0.2]), PER, losses=falling(60)).alarm
    verdict = judge(looks(HACKED), PER, losses=flat(80))
    assert not verdict.alarm and verdict.rise.value > 0 and verdict.trend is not None


def test_four_rises_may_be_chance_five_are_not_and_a_new_best_starts_anew() -> None:
    rising = [0.3, 0.31, 0.32, 0.33, 0.34, 0.35]
    assert judge(looks(rising[:5]), PER, losses=falling(50)).trend is None
    assert judge(looks(rising), PER, losses=falling(60)).alarm
    assert not judge(looks([*rising, 0.29]), PER, losses=falling(70)).alarm


def test_few_losses_say_nothing() -> None:
    late = [pair for pair in falling(80) if pair[0] > 77]
    assert judge(looks(HACKED), PER, losses=late).slope is None
    assert not judge(looks(HACKED), PER, losses=late).alarm


def test_the_first_evaluation_is_its_own_best() -> None:
    verdict = judge(looks([0.5]), PER, losses=falling(10))
    assert not verdict.alarm and verdict.best == verdict.value and verdict.rise.value == 0.0


def test_healthy_runs_hardly_ever_alarm() -> None:
    """Metric and loss level off, with noise of text and of training: 15 runs of 20 evaluations."""
    alarms = 0
    for seed in range(15):
        rng = np.random.default_rng(seed)
        values = [0.3 + 0.2 * float(np.exp(-i / 4)) + float(rng.normal(0, 0.02)) for i in range(20)]
        found = looks(values, noise=1.0, seed=seed)
        losses = [(step, 1.0 + float(np.exp(-step / 40)) + float(rng.normal(0, 0.05))) for step in range(1, 201)]
        alarms += any(judge(found[: n + 1], PER, losses=losses).alarm for n in range(20))
    assert alarms <= 1


def test_looks_survive_a_stop(tmp_path: Path) -> None:
    found = looks(HACKED)
    write_looks(tmp_path / "golden.jsonl", found)
    assert read_looks(tmp_path / "golden.jsonl", until=80) == found
    assert read_looks(tmp_path / "golden.jsonl", until=30) == found[:3]
    assert read_looks(tmp_path / "none.jsonl", until=30) == []


def test_the_report_shows_both_metrics_and_the_first_alarm() -> None:
    metrics = [{"step": step, "loss": loss} for step, loss in falling(80)]
    for n in range(1, 9):
        verdict = judge(looks(HACKED)[:n], PER, losses=falling(80))
        metrics.append({"step": verdict.step, **verdict.metrics()})  # type: ignore[dict-item]
    section = golden_section(metrics)
    titles = [getattr(block, "title", "") for block in section.blocks]
    assert titles == ["", "Golden metric", "Proxy", "Golden metric against proxy"]
    assert golden_line(metrics).startswith("alarm at step 80; golden metric 1.")
    assert not golden_section([{"step": 1, "loss": 2.0}]).blocks

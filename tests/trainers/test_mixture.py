"""The share of on-policy rows against its definition, and in runs: what it is measured on, that it moves, that it resumes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from kdlib.objectives import CrossEntropy
from kdlib.samplers import RolloutConfig
from kdlib.trainers import DistillationTrainer
from kdlib.trainers.callbacks import STATE_FILE
from kdlib.trainers.mixture import EntropyMixture
from tests.tiny import tiny_llama
from tests.trainers.small import V, logged, trainer_of, weights_of

ROWS = [{"prompt": f"{'two plus ' * (1 + i % 3)}{i}", "completion": " is four."} for i in range(16)]
CONFIG = {"on_policy_fraction": 0.8, "on_policy_minimum": 0.2, "max_completion_length": 5, "max_steps": 4}
NAN = math.nan


def mixture(*entropies: float) -> EntropyMixture:
    made = EntropyMixture(low=0.2, high=0.8)
    for entropy in entropies:
        made.update([{"drawn_logp": torch.full((1, 3), -entropy)}], Accelerator(cpu=True))
    return made


def test_the_share_follows_the_entropy_between_its_bounds() -> None:
    assert mixture().share == 0.8, "nothing is known before the first step"
    assert mixture(2.0).share == pytest.approx(0.8)
    now = 0.9 * 2.0 + 0.1 * 1.0
    assert mixture(2.0, 1.0).share == pytest.approx(0.2 + 0.6 * now / 2.0)
    assert mixture(2.0, *[0.0] * 300).share == pytest.approx(0.2, abs=1e-6)
    assert mixture(2.0, 5.0).share == pytest.approx(0.8), "above its start it stays at the most"
    falls = [mixture(2.0, *[1.0] * n).share for n in range(5)]
    assert falls == sorted(falls, reverse=True)
    assert mixture(2.0, *[1.0] * 5, *[2.0] * 50).share > mixture(2.0, *[1.0] * 5).share, "and it rises again"


def test_the_mean_is_over_what_was_drawn_alone() -> None:
    made = EntropyMixture(low=0.2, high=0.8)
    batches = [
        {"drawn_logp": torch.tensor([[NAN, -1.0, -2.0], [NAN, NAN, NAN]])},
        {},
        {"drawn_logp": torch.tensor([[-6.0, NAN]])},
    ]
    made.update(batches, Accelerator(cpu=True))
    assert made.now == made.start == pytest.approx(3.0)
    made.update([{}], Accelerator(cpu=True))
    assert made.now == 3.0, "a step without a draw says nothing"


def test_its_state_goes_through_json() -> None:
    made, other = mixture(2.0, 1.0), mixture()
    other.restore(json.loads(json.dumps(made.state)))
    assert (other.share, other.metrics) == (made.share, made.metrics)


def trained(directory: Path, **given: Any) -> DistillationTrainer:
    trainer = trainer_of(directory, rows=ROWS, config={**CONFIG, **given.pop("config", {})}, **given)
    trainer.train()
    return trainer


def test_the_entropy_is_that_of_what_was_drawn(tmp_path: Path) -> None:
    """Of the first step: the mean of -log q of the drawn tokens, by a student that has not moved."""
    trainer = trainer_of(tmp_path, rows=ROWS, config={**CONFIG, "max_steps": 1})
    seen: list[Any] = []
    original = trainer.prepare
    trainer.prepare = lambda batches: seen.extend(batches) or original(batches)  # type: ignore[method-assign]
    trainer.train()
    total, count, student = 0.0, 0, tiny_llama(V)
    for batch in seen:
        with torch.no_grad():
            logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[..., :V]
        drawn = ~batch["drawn_logp"][:, 1:].isnan()
        logp = logits[:, :-1].log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
        total, count = total - logp[drawn].sum().item(), count + int(drawn.sum())
    assert count and logged(trainer, "mixture/entropy")[0] == pytest.approx(total / count, rel=1e-4)


def test_a_student_that_sharpens_gets_more_of_the_teachers_text(tmp_path: Path) -> None:
    """Cross-entropy on short texts takes most of the entropy in a few steps."""
    config = {"max_steps": 60, "learning_rate": 5e-3, "lr_scheduler_type": "constant", "on_policy_minimum": 0.1}
    trainer = trained(tmp_path, teacher=None, objective=CrossEntropy(), config=config)
    shares, entropies = logged(trainer, "mixture/on_policy"), logged(trainer, "mixture/entropy")
    assert entropies[-1] < 0.7 * entropies[0] and shares[-1] < 0.75 * shares[0]
    for share, entropy in zip(shares, entropies, strict=True):
        assert share == pytest.approx(0.1 + 0.7 * min(1.0, entropy / entropies[0]))


def test_the_share_is_the_one_that_rows_are_drawn_with(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, rows=ROWS, config={**CONFIG, "max_steps": 3})
    assert trainer.on_policy is not None and trainer.on_policy.mixture is not None
    fractions: list[float] = []
    original = trainer.on_policy._made
    trainer.on_policy._made = lambda work, step: fractions.append(trainer.on_policy.rollouts.fraction) or original(work, step)  # type: ignore
    trainer.train()
    assert fractions == [0.8, *logged(trainer, "mixture/on_policy")[:2]]


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = {**CONFIG, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-3}
    whole, resumed = (trainer_of(tmp_path / name, rows=ROWS, config=config) for name in ("whole", "resumed"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for name, expected in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], expected), name
    states = [(tmp_path / run / "checkpoint-4" / STATE_FILE).read_text() for run in ("whole", "resumed")]
    assert states[0] == states[1] and "mixture" in states[0]
    assert logged(resumed, "mixture/on_policy")[-2:] == logged(whole, "mixture/on_policy")[-2:]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"on_policy_minimum": 0.0}, "at 0 nothing measures the entropy"),
        ({"on_policy_minimum": 0.9}, "0 < on_policy_minimum <= on_policy_fraction < 1"),
        ({"on_policy_fraction": 1.0}, "at 1 rows have no completions of their own"),
        ({"on_policy_fraction": 0.0}, "0 < on_policy_minimum <= on_policy_fraction"),
        ({"rollout": RolloutConfig(temperature=0.0)}, "needs rollout_source student and a rollout.temperature above 0"),
        ({"rollout_source": "teacher"}, "needs rollout_source student"),
    ],
)
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows=ROWS, config={**CONFIG, **config})

"""The weights of terms that are balanced: from the gradients of the whole step before, against those of autograd."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.objectives.cross import ALM, HybridULD
from kdlib.trainers.balance import GradientBalance
from kdlib.trainers.callbacks import STATE_FILE
from tests.trainers.cross_plain import PAIRS, cross_trainer, other_model, plain, rows_of
from tests.trainers.small import Weights, double, logged

WEIGHTS = {"distill": 2.0, "hidden": 1.5, "cross_entropy": 0.5}
OBJECTIVE = ALM(temperature=4.0, weight=2.0, hidden=1.5, cross_entropy=0.5, balance="gradient")


def balanced(norms: dict[str, float], weights: dict[str, float]) -> dict[str, float]:
    """w_k = c_k / g_k times sum(c) / sum(c / g)."""
    scale = sum(weights.values()) / sum(weights[name] / norm for name, norm in norms.items())
    return {name: scale * weights[name] / norm for name, norm in norms.items()}


# By itself


def test_what_flows_back_is_measured_and_not_changed() -> None:
    """Over two micro-batches; a term's gradient is that of its weighted mean."""
    balance = GradientBalance({"a": 1.0, "b": 3.0})
    plain_hidden = [torch.arange(6.0).view(3, 2), torch.ones(1, 2)]
    total = {"a": 0.0, "b": 0.0}
    for hidden in plain_hidden:
        hidden.requires_grad_()
        seen = {name: balance.watched(hidden, name) for name in total}
        (seen["a"].square().sum() + 3.0 * seen["b"].sin().sum()).backward()
        of = {"a": 2 * hidden.detach(), "b": 3.0 * hidden.detach().cos()}
        torch.testing.assert_close(hidden.grad, of["a"] + of["b"])
        total = {name: total[name] + float(of[name].square().sum()) for name in total}
    squares = balance.taken(torch.device("cpu"))
    assert squares.tolist() == pytest.approx(list(total.values()))
    assert balance.taken(torch.device("cpu")).tolist() == [0.0, 0.0], "each step is measured anew"


def test_hidden_states_without_gradient_pass() -> None:
    hidden = torch.ones(2, 2)
    assert GradientBalance({"a": 1.0}).watched(hidden, "a") is hidden


def test_the_sum_stays_and_all_pull_by_their_weight() -> None:
    """Squares are of the weighted means, so that a step's own weights are taken out again."""
    balance = GradientBalance(WEIGHTS)
    state = {f"weight.{name}": value for name, value in zip(WEIGHTS, (1.0, 2.5, 0.5), strict=True)}
    norms = {"distill": 1e-3, "hidden": 4.0, "cross_entropy": 0.25}
    squares = torch.tensor([(state[f"weight.{name}"] * norm) ** 2 for name, norm in norms.items()])
    found = balance.update(state, squares)
    assert found == pytest.approx({f"weight.{k}": v for k, v in balanced(norms, WEIGHTS).items()}, rel=1e-6)
    assert sum(found.values()) == pytest.approx(4.0)
    pulls = [found[f"weight.{name}"] * norm / WEIGHTS[name] for name, norm in norms.items()]
    assert pulls == pytest.approx([pulls[0]] * 3)
    assert balance.update(found, 1024.0 * squares) != found
    again = torch.tensor([(1024.0 * found[f"weight.{name}"] * norm) ** 2 for name, norm in norms.items()])
    assert balance.update(found, again) == pytest.approx(found), "a loss scale changes nothing"


@pytest.mark.parametrize("square", [0.0, math.nan, math.inf])
def test_a_step_that_says_nothing_of_a_term_leaves_the_weights(square: float) -> None:
    """Without a chunk, or with an overflow in float16, whose step the scaler skips."""
    balance = GradientBalance(WEIGHTS)
    state = balance.init_state()
    assert state == {f"weight.{name}": weight for name, weight in WEIGHTS.items()}
    assert balance.update(state, torch.tensor([square, 1.0, 2.0])) == state


# In training


def projection(trainer: Any) -> torch.Tensor:
    return trainer.tables.modules.weight.detach().clone()


@pytest.mark.parametrize(
    "shape",
    [{}, {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}],
    ids=["whole", "cut"],
)
def test_weights_follow_the_gradients_of_the_step_before(tmp_path: Path, shape: dict[str, int]) -> None:
    weights = Weights()
    config = {**shape, "max_steps": 3, "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    trainer = cross_trainer(tmp_path, OBJECTIVE, callbacks=[weights], config=config)
    trainer.train()
    used = WEIGHTS
    for step, state in enumerate(weights.steps):
        student, matrix = double(), state.pop("kdlib_modules.weight")
        student.load_state_dict(state)
        expected = plain(student, other_model(), PAIRS[:8], OBJECTIVE, projection=matrix)
        assert logged(trainer)[step] == pytest.approx(expected.loss(used).item(), rel=1e-6)
        used = balanced(expected.norms(), WEIGHTS)
        for name, weight in used.items():
            # what the next step will have
            assert logged(trainer, f"objective/weight.{name}")[step] == pytest.approx(weight, rel=1e-5), (step, name)
        assert sum(used.values()) == pytest.approx(4.0)
    assert used["cross_entropy"] < 0.4 and used["distill"] > 2.1, "else nothing was balanced"


def test_a_single_term_keeps_its_weight(tmp_path: Path) -> None:
    objective = HybridULD(weight=3.0, cross_entropy=0.0, balance="gradient")
    trainer = cross_trainer(tmp_path, objective, config={"max_steps": 2})
    trainer.train()
    assert logged(trainer, "objective/weight.distill") == pytest.approx([3.0, 3.0])


def test_weights_are_saved(tmp_path: Path) -> None:
    config = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
    trainer = cross_trainer(tmp_path, OBJECTIVE, config=config)
    trainer.train()
    for step in (1, 2):
        saved = json.loads((tmp_path / f"checkpoint-{step}" / STATE_FILE).read_text())["objective"]
        assert list(saved.values()) == [logged(trainer, f"objective/{name}")[step - 1] for name in saved]
        assert len(saved) == 3


def test_evaluation_and_rows_without_balance_are_left_alone(tmp_path: Path) -> None:
    """Evaluation measures nothing; before the first step the weights are the given ones."""
    trainer = cross_trainer(tmp_path, OBJECTIVE, eval_dataset=rows_of("pairs", 8, 12), config={"max_steps": 1})
    matrix = projection(trainer)
    before = trainer.evaluate()["eval_loss"]
    expected = plain(double(), other_model(), PAIRS[8:12], OBJECTIVE, projection=matrix).loss().item()
    assert before == pytest.approx(expected, rel=1e-9)
    assert trainer.balance is not None and not trainer.balance.taken(torch.device("cpu")).any()

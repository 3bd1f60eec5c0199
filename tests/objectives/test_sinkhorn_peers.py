"""Batch-wise Sinkhorn against POT and geomloss, once all of them have converged."""

from __future__ import annotations

from typing import Any

import numpy as np
import ot
import pytest
import torch
from geomloss import SamplesLoss
from geomloss._legacy import sinkhorn_divergence as geomloss_loop
from torch import Tensor

from kdlib.objectives import Sinkhorn
from tests.objectives import oracle
from tests.objectives.cases import logits

N, V = 6, 7
METRICS = {"l1": "cityblock", "sqeuclidean": "sqeuclidean"}

cost_names = pytest.mark.parametrize("cost", METRICS)
epsilons = pytest.mark.parametrize("epsilon", [0.1, 0.3], ids="eps_{}".format)


def distributions(rows: Tensor, temperature: float) -> np.ndarray[Any, Any]:
    return np.array([oracle.softmax(row, temperature) for row in rows.tolist()])


@cost_names
@epsilons
@pytest.mark.parametrize("loss", ["transport", "dual"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_values_are_pots(cost: Any, epsilon: float, loss: Any, temperature: float) -> None:
    student, teacher, _ = logits(N, vocab=V)
    options = Sinkhorn(cost=cost, epsilon=epsilon, loss=loss, temperature=temperature, iterations=300)
    x, y = (distributions(z, temperature) for z in (student, teacher))
    result = ot.solve(ot.dist(x, y, metric=METRICS[cost]), reg=epsilon, reg_type="KL", max_iter=20_000, tol=1e-11)
    found = options.on_logits(student, teacher)
    wanted = result.value if loss == "dual" else result.value_linear
    assert (found.sum / found.count).item() == pytest.approx(wanted, abs=1e-9)
    assert found.metrics["sinkhorn_marginal_error"][0] < 1e-8


@cost_names
@pytest.mark.parametrize("epsilon", [0.3, 1.0], ids="eps_{}".format)  # below that POT needs 20,000 iterations from y to y
@pytest.mark.parametrize("loss", ["transport", "dual"])
def test_debiased_values_are_those_of_three_problems_of_pot(cost: Any, epsilon: float, loss: Any) -> None:
    student, teacher, _ = logits(N, vocab=V)
    x, y = (distributions(z, 2.0) for z in (student, teacher))

    def solved(u: np.ndarray[Any, Any], v: np.ndarray[Any, Any]) -> float:
        costs = ot.dist(u, v, metric=METRICS[cost])
        result = ot.solve(costs, reg=epsilon, reg_type="KL", max_iter=20_000, tol=1e-11)
        return result.value if loss == "dual" else result.value_linear

    options = Sinkhorn(cost=cost, epsilon=epsilon, loss=loss, iterations=600, debiased=True)
    with torch.no_grad():
        found = options.on_logits(student, teacher)
    wanted = solved(x, y) - 0.5 * solved(x, x) - 0.5 * solved(y, y)
    assert (found.sum / found.count).item() == pytest.approx(wanted, abs=1e-8)


@pytest.fixture
def fixed_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """geomloss at its last epsilon 600 times: its own schedule stops before it has converged, whatever its ``scaling``."""
    monkeypatch.setattr(geomloss_loop, "epsilon_schedule", lambda p, diameter, blur, scaling: [blur**p] * 600)


@pytest.mark.usefixtures("fixed_epsilon")
@cost_names
@epsilons
@pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])
def test_the_dual_and_its_gradient_are_those_of_geomloss(cost: Any, epsilon: float, debiased: bool) -> None:
    student, teacher, _ = logits(N, vocab=V)
    student.requires_grad_()

    def between(x: Tensor, y: Tensor) -> Tensor:
        gap = x[..., :, None, :] - y[..., None, :, :]
        return gap.abs().sum(-1) if cost == "l1" else gap.square().sum(-1)

    peer = SamplesLoss("sinkhorn", p=1, blur=epsilon, debias=debiased, cost=between, backend="tensorized")
    wanted = peer((student / 2).softmax(-1), (teacher / 2).softmax(-1))
    found = Sinkhorn(cost=cost, epsilon=epsilon, loss="dual", iterations=600, debiased=debiased).on_logits(student, teacher)
    assert (found.sum / N).item() == pytest.approx(wanted.item(), abs=1e-9)
    (ours,), (theirs,) = (torch.autograd.grad(value, student) for value in (found.sum / N, wanted))
    assert theirs.abs().max() > 1e-4
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-8)


@cost_names
def test_the_transports_gradient_is_that_through_pots_iterations(cost: Any) -> None:
    student, teacher, _ = logits(N, vocab=V)
    student.requires_grad_()
    x, y = ((z / 2).softmax(-1) for z in (student, teacher))
    costs = (x[:, None] - y).abs().sum(-1) if cost == "l1" else (x[:, None] - y).square().sum(-1)
    result = ot.solve(costs, reg=0.1, reg_type="KL", max_iter=400, tol=1e-11, grad="autodiff")
    (wanted,) = torch.autograd.grad(result.value_linear, student)
    found = Sinkhorn(cost=cost, iterations=300).on_logits(student, teacher)
    torch.testing.assert_close(torch.autograd.grad(found.sum / N, student)[0], wanted, rtol=0.0, atol=1e-8)

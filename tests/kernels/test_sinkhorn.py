"""Entropic transport against POT, geomloss, scaling iterations in plain form and finite differences."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import ot
import pytest
import torch
from geomloss import SamplesLoss
from geomloss._legacy import sinkhorn_divergence as geomloss_loop
from torch import Tensor

from kdlib.kernels.sinkhorn import Loss, Transported, potentials, sinkhorn, transport_plan

# Enough at each epsilon for marginals within 1e-12 in float64: iterations of rows, then columns.
CONVERGED = {0.01: 1000, 0.03: 700, 0.1: 200, 1.0: 40}
SLOWER = 4  # half a step of both sides at once takes so many times longer

epsilons = pytest.mark.parametrize("epsilon", CONVERGED, ids="eps_{}".format)
LOSSES: tuple[Loss, ...] = ("transport", "dual")
losses = pytest.mark.parametrize("loss", LOSSES)
order = pytest.mark.parametrize("symmetric", [False, True], ids=["alternating", "symmetric"])


def problem(n: int, m: int, *batch: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Costs of 0..2 [..., n, m] and the logits of both masses, in float64."""
    generator = torch.Generator().manual_seed(seed)
    cost = 2.0 * torch.rand(*batch, n, m, generator=generator, dtype=torch.float64)
    a, b = (torch.randn(*batch, k, generator=generator, dtype=torch.float64) for k in (n, m))
    return cost, a, b


def solved(cost: Tensor, a: Tensor, b: Tensor, **options: Any) -> Transported:
    """From logits of the masses, so that gradients keep to masses that sum to one."""
    return sinkhorn(cost, a.log_softmax(-1), b.log_softmax(-1), **options)


def gradients(value: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(value.sum(), leaves))


def leaves_of(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in tensors]


def pot_plan(cost: Tensor, a: Tensor, b: Tensor, epsilon: float) -> np.ndarray[Any, Any]:
    masses = [x.softmax(-1).numpy() for x in (a, b)]
    return ot.sinkhorn(*masses, cost.numpy(), epsilon, method="sinkhorn_log", numItermax=20_000, stopThr=1e-11)


def pot_value(cost: Tensor, a: Tensor, b: Tensor, epsilon: float) -> Any:
    return ot.solve(cost, a, b, reg=epsilon, reg_type="KL", max_iter=20_000, tol=1e-11)


# Values ---------------------------------------------------------------------------------------------


@epsilons
@pytest.mark.parametrize(("n", "m", "symmetric"), [(5, 7, False), (1, 3, False), (6, 6, False), (4, 6, True)], ids=str)
def test_plan_and_both_values_are_pots(n: int, m: int, epsilon: float, symmetric: bool) -> None:
    cost, a, b = problem(n, m)
    iterations = CONVERGED[epsilon] * (SLOWER if symmetric else 1)
    options: dict[str, Any] = {"epsilon": epsilon, "iterations": iterations, "symmetric": symmetric}
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    f, g = potentials(cost, log_a, log_b, **options)
    plan = transport_plan(cost, log_a, log_b, f=f, g=g, epsilon=epsilon).numpy()
    wanted = pot_plan(cost, a, b, epsilon)
    np.testing.assert_allclose(plan, wanted, atol=1e-9)
    transport, dual = (solved(cost, a, b, loss=loss, **options) for loss in LOSSES)
    assert transport.value.item() == pytest.approx((wanted * cost.numpy()).sum(), abs=1e-9)
    assert dual.value.item() == pytest.approx(pot_value(cost, a.softmax(-1), b.softmax(-1), epsilon).value.item(), abs=1e-9)
    assert transport.marginal_error.item() == dual.marginal_error.item() < 1e-8


@losses
@order
def test_a_batch_is_its_problems_one_by_one(loss: Loss, symmetric: bool) -> None:
    options: dict[str, Any] = {"epsilon": 0.1, "iterations": 7, "loss": loss, "symmetric": symmetric}
    leaves = leaves_of(*problem(4, 6, 2, 3))
    found = solved(*leaves, **options)
    assert found.value.shape == found.marginal_error.shape == (2, 3)
    for index, of_batch in zip(itertools.product(range(2), range(3)), found.value.flatten(), strict=True):
        alone = leaves_of(*(x[index] for x in leaves))
        one = solved(*alone, **options)
        torch.testing.assert_close(of_batch, one.value)
        torch.testing.assert_close(found.marginal_error[index], one.marginal_error)
        for x, y in zip(torch.autograd.grad(of_batch, leaves, retain_graph=True), gradients(one.value, alone), strict=True):
            torch.testing.assert_close(x[index], y)


def test_the_marginal_error_is_the_distance_of_both_marginals() -> None:
    cost, a, b = problem(4, 6)
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    f, g = potentials(cost, log_a, log_b, epsilon=0.05, iterations=3)
    plan = transport_plan(cost, log_a, log_b, f=f, g=g, epsilon=0.05)
    rows, columns = (plan.sum(1) - log_a.exp()).abs().sum(), (plan.sum(0) - log_b.exp()).abs().sum()
    leaves = leaves_of(cost, a, b)
    found = solved(*leaves, epsilon=0.05, iterations=3, loss="transport").marginal_error
    assert rows > 0.01 and columns < 1e-12  # three iterations have not converged; columns were the last to be met
    assert found.item() == pytest.approx((rows + columns).item()) and not found.requires_grad


def test_few_iterations_are_as_many_as_asked_for() -> None:
    cost, a, b = problem(4, 6)
    for iterations in (1, 2, 5):
        leaves = [cost, a.softmax(-1), b.softmax(-1)]
        wanted = scaled(*leaves, epsilon=0.1, iterations=iterations)
        assert solved(cost, a, b, epsilon=0.1, iterations=iterations, loss="transport").value.item() == pytest.approx(
            wanted.item(), abs=1e-12
        )


# Points without mass --------------------------------------------------------------------------------


@losses
@order
def test_points_without_mass_are_as_if_left_out(loss: Loss, symmetric: bool) -> None:
    options: dict[str, Any] = {"epsilon": 0.1, "iterations": 9, "loss": loss, "symmetric": symmetric}
    cost, a, b = problem(5, 6)
    rows, columns = torch.tensor([True, False, True, True, False]), torch.tensor([False, True, True, True, True, False])
    a, b = a.masked_fill(~rows, -torch.inf), b.masked_fill(~columns, -torch.inf)
    leaves = leaves_of(cost, a, b)
    few = leaves_of(cost[rows][:, columns], a[rows], b[columns])
    found, wanted = solved(*leaves, **options), solved(*few, **options)
    torch.testing.assert_close(found.value, wanted.value)
    torch.testing.assert_close(found.marginal_error, wanted.marginal_error)
    of_cost, of_a, of_b = gradients(found.value, leaves)
    to_cost, to_a, to_b = gradients(wanted.value, few)
    torch.testing.assert_close(of_cost[rows][:, columns], to_cost)
    torch.testing.assert_close(of_a[rows], to_a)
    torch.testing.assert_close(of_b[columns], to_b)
    assert not of_cost[~rows].any() and not of_cost[:, ~columns].any() and not of_a[~rows].any() and not of_b[~columns].any()


# Gradients ------------------------------------------------------------------------------------------


def scaled(cost: Tensor, a: Tensor, b: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """sum P C by the matrix scaling u = a / (K v), v = b / (K' u) of Sinkhorn, outside the log domain."""
    kernel = (-cost / epsilon).exp()
    v = b
    for _ in range(iterations):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return (u[:, None] * kernel * v * cost).sum()


@pytest.mark.parametrize("iterations", [1, 3, 40])
@pytest.mark.parametrize("epsilon", [0.1, 1.0], ids="eps_{}".format)
def test_gradients_of_the_transport_are_those_of_a_plain_loop(iterations: int, epsilon: float) -> None:
    leaves = leaves_of(*problem(5, 7))
    found = solved(*leaves, epsilon=epsilon, iterations=iterations, loss="transport").value
    wanted = scaled(leaves[0], leaves[1].softmax(-1), leaves[2].softmax(-1), epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(found, wanted)
    for x, y in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@order
def test_gradcheck_of_the_transport_before_it_has_converged(symmetric: bool) -> None:
    def value(*leaves: Tensor) -> Tensor:
        return solved(*leaves, epsilon=0.2, iterations=3, loss="transport", symmetric=symmetric).value

    assert torch.autograd.gradcheck(value, leaves_of(*problem(3, 4, 2)))


@pytest.mark.parametrize(("epsilon", "symmetric"), [(0.1, False), (1.0, False), (1.0, True)], ids=str)
def test_gradcheck_of_the_dual_once_it_has_converged(epsilon: float, symmetric: bool) -> None:
    iterations = CONVERGED[epsilon] * (SLOWER if symmetric else 1)

    def value(*leaves: Tensor) -> Tensor:
        return solved(*leaves, epsilon=epsilon, iterations=iterations, loss="dual", symmetric=symmetric).value

    assert torch.autograd.gradcheck(value, leaves_of(*problem(2, 3)))


@pytest.mark.parametrize("grad", ["envelope", "autodiff"])
@pytest.mark.parametrize("epsilon", [0.1, 1.0], ids="eps_{}".format)
def test_gradients_of_the_dual_are_pots(epsilon: float, grad: str) -> None:
    leaves = leaves_of(*problem(5, 7))
    found = solved(*leaves, epsilon=epsilon, iterations=CONVERGED[epsilon], loss="dual").value
    masses = (leaves[1].softmax(-1), leaves[2].softmax(-1))
    options: dict[str, Any] = {"reg": epsilon, "reg_type": "KL", "max_iter": 3000, "tol": 1e-11, "grad": grad}
    wanted = ot.solve(leaves[0], *masses, **options).value
    assert found.item() == pytest.approx(wanted.item(), abs=1e-9)
    # POT's envelope gives masses the gradient f + epsilon log a, that of sum P log P, whatever reg_type says; autodiff gives f
    leaves = leaves if grad == "autodiff" else leaves[:1]
    for x, y in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=1e-8)


@pytest.fixture
def fixed_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    """geomloss at its last epsilon from the first iteration on, 600 times.

    Its own schedule lowers epsilon by the factor ``scaling`` an iteration, from the diameter, and spends one iteration on the
    last: the potentials are then behind by an amount in proportion to 1 - scaling (of 4e-5 in value and 6e-3 in gradient at
    0.99), which no ``scaling`` below 1 brings to 1e-6 in reasonable time.
    """
    monkeypatch.setattr(geomloss_loop, "epsilon_schedule", lambda p, diameter, blur, scaling: [blur**p] * 600)


def l1(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., :, None, :] - y[..., None, :, :]).abs().sum(-1)


def squared(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)


@pytest.mark.usefixtures("fixed_epsilon")
@pytest.mark.parametrize("debias", [False, True], ids=["plain", "debiased"])
@pytest.mark.parametrize("cost", [l1, squared], ids=lambda f: f.__name__)
@pytest.mark.parametrize("epsilon", [0.1, 0.5], ids="eps_{}".format)
def test_value_and_gradients_are_those_of_geomloss(cost: Any, epsilon: float, debias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.rand(k, 3, generator=generator, dtype=torch.float64) for k in (6, 7))
    leaves = leaves_of(x, y, *problem(6, 7)[1:])
    x, y, a, b = leaves

    def ours(u: Tensor, v: Tensor, of_u: Tensor, of_v: Tensor) -> Tensor:
        found = solved(cost(u, v), of_u, of_v, epsilon=epsilon, iterations=600, loss="dual", symmetric=debias)
        assert found.marginal_error < 1e-9
        return found.value

    value = ours(x, y, a, b)
    if debias:
        value = value - 0.5 * ours(x, x, a, a) - 0.5 * ours(y, y, b, b)
    peer = SamplesLoss("sinkhorn", p=1, blur=epsilon, debias=debias, cost=cost, backend="tensorized")
    wanted = peer(a.softmax(-1), x, b.softmax(-1), y)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-9)
    for u, v in zip(gradients(value, leaves), gradients(wanted, leaves), strict=True):
        torch.testing.assert_close(u, v, rtol=0.0, atol=1e-8)


# Precision and memory -------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "symmetric"), [("transport", False), ("dual", False), ("dual", True)], ids=str)
@pytest.mark.parametrize("epsilon", [1e-3, 1e-2], ids="eps_{}".format)
def test_small_epsilons_in_float32_are_near_the_unregularised_optimum(epsilon: float, loss: Loss, symmetric: bool) -> None:
    n = 8
    cost = 2.0 * torch.rand(n, n, generator=torch.Generator().manual_seed(0))
    leaves = leaves_of(cost, torch.zeros(n), torch.zeros(n))
    found = solved(*leaves, epsilon=epsilon, iterations=2000 if symmetric else 400, loss=loss, symmetric=symmetric)
    exact = ot.emd2([], [], cost.double().numpy())
    assert found.value.item() == pytest.approx(exact, abs=epsilon * np.log(n) + 2e-3)  # KL(P | a b') <= log n
    assert all(x.isfinite().all() for x in gradients(found.value, leaves))


@losses
def test_a_cost_of_2_at_epsilon_1e_3_underflows_nothing(loss: Loss) -> None:
    leaves = leaves_of(2.0 - torch.eye(4), torch.zeros(4), torch.zeros(4))  # exp(-2 / 1e-3) is 0 in float64 too
    found = solved(*leaves, epsilon=1e-3, iterations=20, loss=loss)
    entropic = 1e-3 * np.log(4) if loss == "dual" else 0.0
    assert found.value.item() == pytest.approx(1.0 + entropic, abs=1e-5)
    of_cost = gradients(found.value, leaves)[0]
    torch.testing.assert_close(of_cost, torch.eye(4) / 4, atol=1e-3, rtol=0.0)


def kept_for_backward(loss: Loss, iterations: int, n: int) -> list[int]:
    """Elements of each storage that the graph holds."""
    held: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x  # held, so that no address is given twice
        return x

    leaves = leaves_of(*problem(n, n))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        value = solved(*leaves, epsilon=0.1, iterations=iterations, loss=loss).value
    assert value.requires_grad
    return [x.untyped_storage().nbytes() // x.element_size() for x in held.values()]


@losses
def test_more_iterations_keep_no_more_plans_for_backward(loss: Loss) -> None:
    n = 40
    few, many = (kept_for_backward(loss, iterations, n) for iterations in (2, 60))
    assert sum(size >= n * n for size in many) == sum(size >= n * n for size in few) <= 4
    assert sum(many) - sum(few) <= 58 * 2 * n  # the potentials that an iteration starts from

"""``linear_rows`` against plain autograd on all logits at once, for any upstream gradient."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdlib.kernels import linear_rows
from kdlib.types import DenseView
from tests.kernels.test_linear_objective import HEADS, LargestTensor, Problem, problem

Rows = Callable[[DenseView, slice], Tensor]
TARGETS = torch.randn(600, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(-1)


def squared_gaps(q: DenseView, rows: slice) -> Tensor:
    """[n], with a target of each row that only ``rows`` tells."""
    x = q.at(2.0).logp.exp()
    return (x - TARGETS[rows].to(x.dtype)).square().sum(-1)


def distances(q: DenseView, rows: slice) -> Tensor:
    """[n, 5], the distance from five fixed distributions."""
    x = q.at(2.0).logp.exp()
    return torch.cdist(x, TARGETS[:5].to(x.dtype), p=1.0)


def surprise(q: DenseView, rows: slice) -> Tensor:
    """[n, 2, 3], values in more than one further axis."""
    logq = q.at(1.0).logp
    return -logq[:, :6].unflatten(-1, (2, 3)) * TARGETS[rows, None, :3].to(logq.dtype)


ROWS: dict[str, Rows] = {"n": squared_gaps, "n_J": distances, "n_J_K": surprise}
of_rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def upstream_of(values: Tensor) -> Tensor:
    """A gradient of either sign for each value, zero for some rows."""
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    upstream[::7] = 0.0
    return upstream.to(values.dtype)


def leaves_of(at: Problem) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_(name not in at.frozen) for name, x in at.leaves.items()}


def found_of(at: Problem, row: Rows) -> tuple[Tensor, dict[str, Tensor | None]]:
    leaves = leaves_of(at)
    values = linear_rows(at.student(leaves), row)
    values.backward(upstream_of(values))
    return values.detach(), {name: x.grad for name, x in leaves.items()}


def wanted_of(at: Problem, row: Rows) -> tuple[Tensor, dict[str, Tensor | None]]:
    leaves = leaves_of(at)
    student = at.student(leaves)
    values = row(DenseView(student.head(student.hidden)), slice(0, len(student.hidden)))
    values.backward(upstream_of(values))
    return values.detach(), {name: x.grad for name, x in leaves.items()}


def assert_same(at: Problem, row: Rows) -> None:
    (values, gradients), (wanted, of_wanted) = found_of(at, row), wanted_of(at, row)
    assert values.shape == wanted.shape and values.shape[0] == len(at.labels)
    torch.testing.assert_close(values, wanted, rtol=1e-10, atol=1e-10)
    for name, gradient in of_wanted.items():
        assert (gradient is None) == (gradients[name] is None) == (name in at.frozen), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


# Values and gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [squared_gaps, distances], ids=["n", "n_J"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_every_head_and_shape_of_values(head: dict[str, Any], row: Rows) -> None:
    assert_same(problem(270, **head), row)


@of_rows
@pytest.mark.parametrize("n", [1, 255, 256, 257, 600])
def test_every_number_of_rows(n: int, row: Rows) -> None:
    assert_same(problem(n, lora=True, bias=True), row)


@of_rows
@pytest.mark.parametrize("size", [1, 7, 20])
def test_chunks_of_any_size(size: int, row: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.import_module("kdlib.kernels.chunked"), "CPU_CHUNK", size)
    seen: list[int] = []

    def counted(q: DenseView, rows: slice) -> Tensor:
        seen.append(rows.stop - rows.start)
        return row(q, rows)

    at = problem(20, lora=True)
    found_of(at, counted)
    full, rest = divmod(20, size)
    assert seen == 2 * ([size] * full + [rest] * (rest > 0))  # forward, then backward
    assert_same(at, row)


def test_weights_of_positions_are_not_applied() -> None:
    at = problem(40, weighted=True)
    values, gradients = found_of(at, squared_gaps)
    wanted, of_wanted = found_of(replace(at, weight=None), squared_gaps)
    assert torch.equal(values, wanted)
    torch.testing.assert_close(gradients, of_wanted)


@pytest.mark.parametrize("loss", [torch.sum, torch.logsumexp], ids=["sum", "logsumexp"])
def test_a_loss_of_all_rows_sends_back_any_upstream(loss: Callable[..., Tensor]) -> None:
    at = problem(300, lora=True)
    ours, theirs = leaves_of(at), leaves_of(at)
    loss(linear_rows(at.student(ours), squared_gaps), 0).backward()
    student = at.student(theirs)
    loss(squared_gaps(DenseView(student.head(student.hidden)), slice(0, 300)), 0).backward()
    for name, leaf in ours.items():
        torch.testing.assert_close(leaf.grad, theirs[name].grad, rtol=1e-10, atol=1e-10)


@of_rows
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 4e-3)], ids=str)
def test_precision(row: Rows, dtype: torch.dtype, tolerance: float) -> None:
    at = problem(300, lora=True, bias=True, dtype=dtype)
    values, gradients = found_of(at, row)
    exact = replace(at, leaves={name: x.double() for name, x in at.leaves.items()})
    wanted, of_wanted = wanted_of(exact, row)
    assert values.dtype == torch.float32
    assert (values.double() - wanted).norm() <= 5e-6 * wanted.norm()
    for name, gradient in of_wanted.items():
        found = gradients[name]
        assert gradient is not None and found is not None and found.dtype == dtype
        assert (found.double() - gradient).norm() <= tolerance * gradient.norm(), name


def test_autocast_does_not_round_anything() -> None:
    at = problem(300, dtype=torch.float32, lora=True)

    def scores(q: DenseView, rows: slice) -> Tensor:
        return q.at(1.0).logp.exp() @ torch.linspace(0.0, 1.0, 33).view(11, 3)

    values, gradients = found_of(at, scores)
    leaves = leaves_of(at)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = linear_rows(at.student(leaves), scores)
    inside.backward(upstream_of(inside))
    assert torch.equal(inside, values)
    for name, leaf in leaves.items():
        assert leaf.grad is not None and torch.equal(leaf.grad, gradients[name])


# Graphs and memory ----------------------------------------------------------------------------------


def test_without_gradients_there_are_values_and_no_graph() -> None:
    at = problem(300)
    wanted, _ = found_of(at, distances)
    with torch.no_grad():
        values = linear_rows(at.student(leaves_of(at)), distances)
    assert not values.requires_grad and torch.equal(values, wanted)


def test_a_second_backward_is_refused() -> None:
    values = linear_rows(problem(20).student(leaves_of(problem(20))), squared_gaps)
    values.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once: call linear_rows again"):
        values.sum().backward()


def test_second_derivatives_are_refused() -> None:
    leaves = leaves_of(problem(20))
    values = linear_rows(problem(20).student(leaves), squared_gaps)
    gradient = torch.autograd.grad(values.square().sum(), leaves["hidden"], create_graph=True)[0]
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_no_tensor_of_all_rows_times_the_vocabulary_is_ever_made() -> None:
    n, vocab = 2048, 200
    at = problem(n, vocab=vocab, dtype=torch.float32)

    def entropies(q: DenseView, rows: slice) -> Tensor:
        logq = q.at(1.0).logp
        return -(logq.exp() * logq).sum(-1)

    largest = {}
    for name, run in (("plain", wanted_of), ("rows", found_of)):
        with LargestTensor() as meter:
            run(at, entropies)
        largest[name] = meter.elements
    assert largest["plain"] >= n * vocab
    assert largest["rows"] <= 256 * vocab


@pytest.mark.parametrize("trained", [False, True])
def test_only_a_trained_head_costs_a_gradient_of_its_size(trained: bool) -> None:
    at = problem(2, vocab=4000, frozen=() if trained else ("weight",), dtype=torch.float32)
    student = at.student(leaves_of(at))
    with LargestTensor() as meter:
        linear_rows(student, lambda q, rows: q.at(1.0).logp[:, 0]).sum().backward()
    assert (meter.elements >= at.leaves["weight"].numel()) == trained

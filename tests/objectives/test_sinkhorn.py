"""Batch-wise Sinkhorn against loops over plain floats, its properties, and what it refuses."""

from __future__ import annotations

import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlib.objectives import Sinkhorn
from kdlib.objectives.sinkhorn.costs import Outcomes, costs
from kdlib.types import Head, Loss, Positions, StudentSignal, TeacherSignal
from tests.objectives import sinkhorn_oracle as oracle
from tests.objectives.cases import logits
from tests.objectives.test_values import graded as graded_logits

N, V = 6, 7
SEQUENCE = [0, 0, 3, 3, 3, 5]

FEW: dict[str, Any] = {"iterations": 4}
OPTIONS: dict[str, Sinkhorn] = {
    "default": Sinkhorn(),
    "sqeuclidean": Sinkhorn(cost="sqeuclidean", epsilon=0.05, **FEW),
    "top_1": Sinkhorn(top_k=1, **FEW),
    "top_3": Sinkhorn(top_k=3, **FEW),
    "top_3_sqeuclidean": Sinkhorn(top_k=3, cost="sqeuclidean", epsilon=0.05, **FEW),
    "temperature_1": Sinkhorn(temperature=1.0, **FEW),
    "epsilon_1": Sinkhorn(epsilon=1.0, **FEW),
    "one_iteration": Sinkhorn(iterations=1),
    "dual": Sinkhorn(loss="dual"),
    "dual_top_3": Sinkhorn(loss="dual", top_k=3, **FEW),
    "debiased": Sinkhorn(debiased=True, **FEW),
    "debiased_dual": Sinkhorn(debiased=True, loss="dual"),
    "debiased_sqeuclidean": Sinkhorn(debiased=True, cost="sqeuclidean", **FEW),
    "sinkd": Sinkhorn(normalize="sinkd", **FEW),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
FOUR = ("default", "top_3", "dual_top_3", "debiased")
four_options = pytest.mark.parametrize("options", [OPTIONS[name] for name in FOUR], ids=FOUR)
groups = pytest.mark.parametrize("group", ["batch", "sequence"])
one_row = pytest.mark.filterwarnings("ignore:Sinkhorn. a group has one row")


def graded(options: Sinkhorn, student: Tensor, teacher: Tensor | TeacherSignal, **positions: Any) -> tuple[Loss, Tensor]:
    """Loss and gradient to the student's logits, which an identity head hands on."""
    hidden = student.detach().clone().requires_grad_()
    loss = options(signal(hidden, Head(weight=torch.eye(student.shape[-1], dtype=student.dtype)), **positions), of(teacher))
    return loss, torch.autograd.grad(loss.sum, hidden)[0]


def signal(hidden: Tensor, head: Head, **positions: Any) -> StudentSignal:
    rows = torch.arange(len(hidden))
    where: dict[str, Any] = {"index": rows, "labels": rows % head.out_features, "sequence": torch.zeros_like(rows)}
    return StudentSignal(hidden=hidden, head=head, positions=Positions(**{**where, **positions}))


def of(teacher: Tensor | TeacherSignal) -> TeacherSignal:
    return teacher if isinstance(teacher, TeacherSignal) else TeacherSignal(logits=teacher)


# Against the formula ----------------------------------------------------------------------------------


@one_row
@every_option
@groups
def test_the_sum_is_the_oracles(options: Sinkhorn, group: Any) -> None:
    options = replace(options, group=group)
    student, teacher, _ = logits(N, vocab=V)
    wanted = oracle.batch(options, student.tolist(), teacher.tolist(), sequence=SEQUENCE)
    loss, _ = graded(options, student, teacher, sequence=torch.tensor(SEQUENCE))
    assert loss.count == N and loss.sum.item() == pytest.approx(wanted, abs=1e-10)
    assert loss.metrics["sinkhorn"][0].item() == pytest.approx(wanted, abs=1e-10) and loss.metrics["sinkhorn"][1] == N


@every_option
def test_the_oracles_two_forms_agree(options: Sinkhorn) -> None:
    student, teacher, _ = logits(N, vocab=V)
    mass = N * N if options.normalize == "sinkd" else N
    found = mass * oracle.plain_batch(options, student, teacher)
    assert found.item() == pytest.approx(oracle.batch(options, student.tolist(), teacher.tolist()), abs=1e-10)


@every_option
def test_the_gradient_is_that_of_the_plain_formula(options: Sinkhorn) -> None:
    student, teacher, _ = logits(N, vocab=V)
    student.requires_grad_()
    mass = N * N if options.normalize == "sinkd" else N
    (wanted,) = torch.autograd.grad(mass * oracle.plain_batch(options, student, teacher), student)
    for _, found in (graded(options, student, teacher), graded_logits(options, student, teacher)):  # type: ignore[arg-type]
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


EXACT: dict[str, Sinkhorn] = {  # a dual's gradient is exact only once it has converged
    **{name: o for name, o in OPTIONS.items() if o.loss == "transport" and name != "default"},
    "dual": Sinkhorn(loss="dual", epsilon=1.0, iterations=40),
    "dual_top_3": Sinkhorn(loss="dual", epsilon=1.0, iterations=40, top_k=3),
    "debiased_dual": Sinkhorn(loss="dual", epsilon=1.0, iterations=80, debiased=True),
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_gradcheck(options: Sinkhorn) -> None:
    student, teacher, _ = logits(2, vocab=4, seed=1)
    assert torch.autograd.gradcheck(lambda s: options.on_logits(s, teacher).sum, student.requires_grad_())


@pytest.mark.parametrize("n", [2, 5, 9])
def test_normalize_sinkd_is_sinkds_loss(n: int) -> None:
    student, teacher, _ = logits(n, vocab=V, seed=n)
    loss, _ = graded(Sinkhorn(normalize="sinkd", epsilon=0.1, iterations=20), student, teacher)
    assert (loss.sum / loss.count).item() == pytest.approx(oracle.sinkd(student.tolist(), teacher.tolist()), abs=1e-10)
    mean, _ = graded(Sinkhorn(), student, teacher)
    torch.testing.assert_close(n * mean.sum, loss.sum)


@one_row
def test_the_marginal_error_is_a_mean_over_rows() -> None:
    student, teacher, _ = logits(N, vocab=V)
    few, _ = graded(Sinkhorn(iterations=1), student, teacher)
    many, _ = graded(Sinkhorn(iterations=400), student, teacher)
    (error, count), (converged, _) = few.metrics["sinkhorn_marginal_error"], many.metrics["sinkhorn_marginal_error"]
    assert count == N and error / N > 0.01 and converged < 1e-9 and not error.requires_grad
    by_sequence, _ = graded(Sinkhorn(iterations=1, group="sequence"), student, teacher, sequence=torch.tensor(SEQUENCE))
    alone = [graded(Sinkhorn(iterations=1), student[i:j], teacher[i:j])[0] for i, j in ((0, 2), (2, 5), (5, 6))]
    wanted = sum(loss.metrics["sinkhorn_marginal_error"][0] for loss in alone)
    torch.testing.assert_close(by_sequence.metrics["sinkhorn_marginal_error"][0], wanted)


# Properties -------------------------------------------------------------------------------------------


def test_one_row_is_twice_the_total_variation() -> None:
    student, teacher, _ = logits(1, vocab=V)
    with pytest.warns(UserWarning, match="a group has one row"):
        loss, _ = graded(Sinkhorn(), student, teacher)
    gaps = (student / 2).softmax(-1) - (teacher / 2).softmax(-1)
    assert loss.sum.item() == pytest.approx(gaps.abs().sum().item())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graded(Sinkhorn(), *logits(2, vocab=V)[:2])


@pytest.mark.parametrize("loss", ["transport", "dual"])
@pytest.mark.parametrize("cost", ["l1", "sqeuclidean"])
@groups
@one_row
def test_debiased_it_is_zero_with_zero_gradient_where_both_agree(loss: Any, cost: Any, group: Any) -> None:
    student, _, _ = logits(N, vocab=V)
    options = Sinkhorn(debiased=True, loss=loss, cost=cost, group=group)
    found, gradient = graded(options, student, student, sequence=torch.tensor(SEQUENCE))
    assert abs(found.sum.item()) < 1e-12 and gradient.abs().max() < 1e-12
    biased, of_biased = graded(replace(options, debiased=False), student, student, sequence=torch.tensor(SEQUENCE))
    assert biased.sum.abs() > 1e-4 or loss == "dual"
    assert of_biased.abs().max() > 1e-4  # what the debiasing takes away


@one_row
@four_options
@groups
def test_it_is_blind_to_the_order_of_teacher_rows_in_a_group(options: Sinkhorn, group: Any) -> None:
    options = replace(options, group=group)
    student, teacher, _ = logits(N, vocab=V)
    sequence = torch.tensor(SEQUENCE)
    wanted, gradient = graded(options, student, teacher, sequence=sequence)
    found, of_found = graded(options, student, teacher[[1, 0, 4, 2, 3, 5]], sequence=sequence)
    torch.testing.assert_close(found.sum, wanted.sum)
    torch.testing.assert_close(of_found, gradient)
    across, _ = graded(options, student, teacher[[2, 1, 0, 3, 4, 5]], sequence=sequence)
    assert torch.allclose(across.sum, wanted.sum) == (group == "batch")


def test_a_permuted_teacher_costs_nothing_more_than_the_same() -> None:
    student = 20.0 * torch.eye(V, dtype=torch.float64)
    found, _ = graded(Sinkhorn(temperature=1.0), student, student.roll(1, 0))
    assert found.sum.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("cost", ["l1", "sqeuclidean"])
@pytest.mark.parametrize("loss", ["transport", "dual"])
def test_all_of_the_vocabulary_as_top_k_is_the_dense_loss(cost: Any, loss: Any) -> None:
    student, teacher, _ = logits(N, vocab=V)
    wanted, gradient = graded(Sinkhorn(cost=cost, loss=loss), student, teacher)
    found, of_found = graded(Sinkhorn(cost=cost, loss=loss, top_k=V), student, teacher)
    torch.testing.assert_close(found.sum, wanted.sum)
    torch.testing.assert_close(of_found, gradient)


@given(st.integers(0, 10_000), st.floats(0.2, 8.0))
@settings(max_examples=15, deadline=None)
def test_the_l1_cost_on_outcomes_rises_with_k_to_the_dense_one(seed: int, scale: float) -> None:
    student, teacher, _ = logits(4, vocab=6, seed=seed, scale=scale)
    x, y = student.softmax(-1), teacher.softmax(-1)
    p, ids = y.sort(-1, descending=True)
    found = [costs(x, Outcomes(ids=ids[:, :k], p=p[:, :k], rest=p[:, k:].sum(-1)), "l1") for k in range(1, 7)]
    for few, more in pairwise([*found, costs(x, y, "l1")]):
        assert (few <= more + 1e-12).all()
    torch.testing.assert_close(found[-1], costs(x, y, "l1"))


def test_costs_in_blocks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, _ = logits(N, vocab=V)
    wanted, gradient = graded(OPTIONS["top_3"], student, teacher)
    monkeypatch.setattr("kdlib.objectives.sinkhorn.costs.GATHERED", 2 * 3 * N)  # of two teacher rows at a time
    found, of_found = graded(OPTIONS["top_3"], student, teacher)
    torch.testing.assert_close(found.sum, wanted.sum)
    torch.testing.assert_close(of_found, gradient)


# Logits: padding, vocabularies, types ------------------------------------------------------------------


@one_row
@four_options
@groups
def test_rows_that_are_not_scored_change_nothing(options: Sinkhorn, group: Any) -> None:
    options = replace(options, group=group)
    student, teacher, _ = logits(N, vocab=V)
    where = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]).bool()
    padded, other = (
        torch.full((3, 4, V), 50.0, dtype=torch.float64).masked_scatter(where[..., None], z) for z in (student, teacher)
    )
    padded[~where] = torch.randn(int((~where).sum()), V, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    wanted, gradient = graded(options, student, teacher, sequence=torch.tensor(SEQUENCE))
    labels = torch.where(where, 0, -100)
    for selected in ({"mask": where}, {"labels": labels}, {"mask": where.long(), "labels": torch.zeros_like(labels)}):
        loss, of_loss = graded_logits(options, padded, other, **selected)  # type: ignore[arg-type]
        assert loss.count == N
        torch.testing.assert_close(loss.sum, wanted.sum)
        torch.testing.assert_close(of_loss[where], gradient)
        assert not of_loss[~where].any()


@pytest.mark.parametrize(
    "options", [OPTIONS[name] for name in ("default", "top_3", "debiased")], ids=["dense", "top_3", "debiased"]
)
@pytest.mark.parametrize("longer", ["student", "teacher"])
def test_padded_vocabularies_are_cut(options: Sinkhorn, longer: str) -> None:
    student, teacher, _ = logits(N, vocab=V)
    wanted, gradient = graded(options, student, teacher)
    padding = torch.full((N, 3), 9.0, dtype=torch.float64)
    if longer == "student":
        student = torch.cat([student, padding], 1)
    else:
        teacher = torch.cat([teacher, padding], 1)
    for loss, of_loss in (graded(options, student, teacher), graded_logits(options, student, teacher)):  # type: ignore[arg-type]
        torch.testing.assert_close(loss.sum, wanted.sum)
        torch.testing.assert_close(of_loss[:, :V], gradient)
        assert not of_loss[:, V:].any()


@every_option
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inputs_of_low_precision_are_widened(options: Sinkhorn, dtype: torch.dtype) -> None:
    student, teacher, _ = logits(N, vocab=V)
    student, teacher = student.to(dtype), teacher.to(dtype)
    wanted, of_wanted = graded(options, student.double(), teacher.double())
    for loss, gradient in (graded(options, student, teacher), graded_logits(options, student, teacher)):  # type: ignore[arg-type]
        assert loss.sum.dtype == torch.float32 and gradient.dtype == dtype
        assert loss.sum.item() == pytest.approx(wanted.sum.item(), rel=2e-5, abs=2e-5)
        assert (gradient.double() - of_wanted).norm() <= (4e-3 if dtype == torch.bfloat16 else 2e-4) * of_wanted.norm()


@every_option
def test_autocast_does_not_round_anything(options: Sinkhorn) -> None:
    student, teacher = (z.float() for z in logits(N, vocab=V)[:2])
    outside, of_outside = graded(options, student, teacher)
    leaf, identity = student.clone().requires_grad_(), Head(weight=torch.eye(V))
    for run in (lambda s: options(signal(s, identity), of(teacher)), lambda s: options.on_logits(s, teacher)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = run(leaf)
        torch.testing.assert_close(inside.sum, outside.sum)
        torch.testing.assert_close(torch.autograd.grad(inside.sum, leaf)[0], of_outside)


@pytest.mark.parametrize(
    "options", [OPTIONS[name] for name in ("default", "sqeuclidean", "top_3", "debiased")], ids=lambda o: o.cost
)
@pytest.mark.parametrize("student_dtype", [torch.float32, torch.float64], ids=str)
def test_student_and_teacher_of_different_precision(options: Sinkhorn, student_dtype: torch.dtype) -> None:
    student, teacher, _ = logits(N, vocab=V)
    other = torch.float32 if student_dtype == torch.float64 else torch.float64
    wanted, of_wanted = graded(options, student, teacher)
    for run in (graded, graded_logits):
        loss, gradient = run(options, student.to(student_dtype), teacher.to(other))  # type: ignore[operator]
        assert loss.sum.item() == pytest.approx(wanted.sum.item(), rel=1e-4)
        torch.testing.assert_close(gradient.double(), of_wanted, rtol=1e-3, atol=1e-4)


@every_option
def test_peaked_rows_stay_finite(options: Sinkhorn) -> None:
    student, teacher, _ = logits(N, vocab=V, scale=100.0)
    teacher[:, 0] = -torch.inf
    loss, gradient = graded(options, student.float(), teacher.float())
    assert loss.sum.isfinite() and gradient.isfinite().all()

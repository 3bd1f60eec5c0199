"""Batch-wise Sinkhorn against loops over plain floats, its properties, and what it refuses."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlib.objectives import TAID, CrossEntropy, ForwardKL, RowObjective, SampledReverseKL, Sinkhorn, Sum
from kdlib.objectives.sinkhorn import TokenPoints
from kdlib.objectives.sinkhorn.costs import Outcomes, costs
from kdlib.types import Head, Loss, Positions, StudentSignal, Support, TeacherSignal
from tests.objectives import sinkhorn_oracle as oracle
from tests.objectives.cases import logits
from tests.objectives.test_supports import top
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


# Heads, chunks, top-k teachers, draws --------------------------------------------------------------------


def linear(n: int, *, vocab: int = 20, width: int = 8) -> tuple[Tensor, Head, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, width), (vocab, width), (n, vocab))
    )
    return hidden.requires_grad_(), Head(weight=weight.requires_grad_()), teacher


ON_HEADS: dict[str, Sinkhorn] = {
    "default": Sinkhorn(iterations=3),
    "top_k": Sinkhorn(iterations=3, top_k=5),
    "dual": Sinkhorn(iterations=3, loss="dual", cost="sqeuclidean"),
    "debiased": Sinkhorn(iterations=3, debiased=True),
    "debiased_dual": Sinkhorn(iterations=3, debiased=True, loss="dual"),
}


def assert_same_on_logits(options: Sinkhorn, sizes: list[int]) -> None:
    """A head's loss and gradients, with groups of these sizes, against those of its logits."""
    hidden, head, teacher = linear(sum(sizes))
    sequence = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    loss = options(signal(hidden, head, sequence=sequence), of(teacher))
    found = torch.autograd.grad(loss.sum, [hidden, head.weight])
    ours, theirs = (z.expand(len(sizes), -1, -1) for z in (head(hidden), teacher))
    wanted = options.on_logits(ours, theirs, mask=torch.nn.functional.one_hot(sequence).T)
    assert loss.count == wanted.count == sum(sizes)
    torch.testing.assert_close(loss.sum, wanted.sum)
    for x, y in zip(found, torch.autograd.grad(wanted.sum, [hidden, head.weight]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 20 student rows, of 16 where rows are points on the other side."""
    monkeypatch.setattr(importlib.import_module("kdlib.kernels.chunked"), "CPU_CHUNK", 20)
    monkeypatch.setattr("kdlib.objectives.sinkhorn.batch.CHUNK", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", ON_HEADS.values(), ids=ON_HEADS)
@groups
def test_a_head_whose_chunks_cut_groups_is_on_logits(options: Sinkhorn, group: Any) -> None:
    assert_same_on_logits(replace(options, group=group), [9, 25, 3, 17])


def test_a_head_with_more_rows_than_a_chunk_is_on_logits() -> None:
    assert_same_on_logits(Sinkhorn(iterations=2, group="sequence"), [100, 290, 210])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", ON_HEADS.values(), ids=ON_HEADS)
def test_a_teachers_head_is_its_logits(options: Sinkhorn) -> None:
    hidden, head, _ = linear(47)
    theirs, weight, _ = linear(47, width=5)
    teacher = TeacherSignal(hidden=theirs.detach(), head=weight.detached())
    found = options(signal(hidden, head), teacher)
    wanted = options(signal(hidden, head), of(weight(theirs).detach()))
    torch.testing.assert_close(found.sum, wanted.sum)
    for x, y in zip(*(torch.autograd.grad(loss.sum, [hidden, head.weight]) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(x, y)


def test_nothing_flows_to_the_teacher() -> None:
    for options in (Sinkhorn(), Sinkhorn(top_k=3), Sinkhorn(debiased=True)):
        student, teacher, _ = logits(N, vocab=V)
        teacher.requires_grad_()
        for loss in (
            options(signal(student.clone().requires_grad_(), Head(weight=torch.eye(V).double())), of(teacher)),
            options.on_logits(student.clone().requires_grad_(), teacher),
        ):
            loss.sum.backward()
        assert teacher.grad is None


@pytest.mark.parametrize("cost", ["l1", "sqeuclidean"])
@pytest.mark.parametrize("k", [1, 3, V])
def test_a_top_k_teacher_is_the_dense_one_with_that_top_k(cost: Any, k: int) -> None:
    student, teacher, _ = logits(N, vocab=V)
    options = Sinkhorn(cost=cost)
    wanted, gradient = graded(replace(options, top_k=k), student, teacher)
    found, of_found = graded(options, student, top(teacher, k, temperature=2.0))
    torch.testing.assert_close(found.sum, wanted.sum)
    torch.testing.assert_close(of_found, gradient)
    fewer, _ = graded(replace(options, top_k=1), student, top(teacher, k, temperature=2.0))
    torch.testing.assert_close(fewer.sum, graded(replace(options, top_k=1), student, teacher)[0].sum)


@pytest.mark.parametrize(
    "options", [Sinkhorn(), Sinkhorn(top_k=2), Sinkhorn(debiased=True)], ids=["dense", "top_2", "debiased"]
)
@one_row
def test_the_smallest_draws_say_which_rows_take_part(options: Sinkhorn) -> None:
    student, teacher, _ = logits(N, vocab=V)
    uniform = torch.tensor([0.9, 0.1, 0.4, 0.8, 0.3, 0.7])
    loss, gradient = graded(replace(options, max_rows=3), student, teacher, uniform=uniform)
    kept = [1, 2, 4]
    alone = oracle.batch(options, student[kept].tolist(), teacher[kept].tolist())
    assert loss.count == N and loss.sum.item() == pytest.approx(alone * N / 3)
    assert gradient.abs().sum(-1).bool().nonzero().flatten().tolist() == kept
    by_sequence = replace(options, max_rows=2, group="sequence")
    loss, gradient = graded(by_sequence, student, teacher, uniform=uniform, sequence=torch.tensor(SEQUENCE))
    pairs = [([0, 1], 2), ([2, 4], 3), ([5], 1)]  # the rows of each sequence that take part, and all it has
    wanted = sum(oracle.batch(options, student[i].tolist(), teacher[i].tolist()) / len(i) * n for i, n in pairs)
    assert loss.count == N and loss.sum.item() == pytest.approx(wanted)
    assert not gradient[3].any()


def test_without_draws_the_same_rows_take_part_every_time() -> None:
    student, teacher, _ = logits(40, vocab=V)
    options = Sinkhorn(max_rows=9)
    loss, gradient = graded(options, student, teacher)
    again, of_again = graded_logits(options, student, teacher)  # type: ignore[arg-type]
    assert loss.count == again.count == 40
    torch.testing.assert_close(again.sum, loss.sum)
    torch.testing.assert_close(of_again, gradient)
    assert int(gradient.abs().sum(-1).bool().sum()) == 9


def test_no_row_is_a_loss_of_zero() -> None:
    hidden, head, teacher = linear(0)
    loss = Sinkhorn()(signal(hidden, head), of(teacher))
    loss.sum.backward()
    assert loss.count == 0 and loss.sum.item() == 0.0 and hidden.grad is not None


# Refusals ---------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "epsilon_0": ({"epsilon": 0.0}, r"Sinkhorn.epsilon must be above 0, not 0.0"),
    "epsilon_negative": ({"epsilon": -1.0}, r"Sinkhorn.epsilon must be above 0"),
    "epsilon_nan": ({"epsilon": float("nan")}, r"Sinkhorn.epsilon must be above 0"),
    "temperature_0": ({"temperature": 0.0}, r"Sinkhorn.temperature must be above 0, not 0.0"),
    "iterations_0": ({"iterations": 0}, r"Sinkhorn.iterations must be at least 1, not 0"),
    "max_rows_1": ({"max_rows": 1}, r"Sinkhorn.max_rows must be at least 2, not 1"),
    "top_k_0": ({"top_k": 0}, r"Sinkhorn.top_k must be at least 1, not 0"),
    "weight_negative": ({"weight": -0.1}, r"Sinkhorn.weight must be at least 0, not -0.1"),
    "cost": ({"cost": "l2"}, r"Sinkhorn.cost must be l1 or sqeuclidean, not 'l2'"),
    "geometry": ({"geometry": "token"}, r"Sinkhorn.geometry must be batch or sample, not 'token'"),
    "loss": ({"loss": "primal"}, r"Sinkhorn.loss must be transport or dual, not 'primal'"),
    "group": ({"group": "all"}, r"Sinkhorn.group must be batch or sequence, not 'all'"),
    "token_cost": ({"token_cost": "dot"}, r"Sinkhorn.token_cost must be cosine or sqeuclidean or l1, not 'dot'"),
    "normalize": ({"normalize": "sum"}, r"Sinkhorn.normalize must be mean or sinkd, not 'sum'"),
    "debiased_top_k": ({"debiased": True, "top_k": 4}, r"compares whole distributions: leave out top_k"),
    "no_divergence": ({"divergence": None}, r"blind to the order of rows: it needs a divergence, such as ForwardKL"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_out_of_range_or_without_effect_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sinkhorn(**options)


@pytest.mark.parametrize(
    "divergence",
    [SampledReverseKL(), CrossEntropy(), TAID(), Sum(parts=((1.0, ForwardKL()), (1.0, TAID())))],
    ids=lambda o: type(o).__name__,
)
def test_divergences_that_are_none_of_two_models_are_refused(divergence: RowObjective) -> None:
    for geometry in ("batch", "sample"):
        with pytest.raises(ValueError, match=f"Sinkhorn.divergence cannot be {type(divergence).__name__}: choose one of two"):
            Sinkhorn(divergence=divergence, geometry=geometry)  # type: ignore[arg-type]


def test_what_a_teacher_must_give() -> None:
    assert Sinkhorn().accepts == Support.FULL | Support.TOPK
    assert Sinkhorn(debiased=True).accepts == Support.FULL
    assert Sinkhorn(debiased=True, geometry="sample").accepts == Support.FULL | Support.TOPK


def test_signals_that_do_not_fit_are_refused() -> None:
    student, teacher, _ = logits(N, vocab=V)
    logp, ids = teacher.log_softmax(-1).topk(3)
    for support in (Support.SAMPLED_TEACHER, Support.SAMPLED_STUDENT):
        with pytest.raises(ValueError, match=r"Sinkhorn accepts .*, the teacher gives Support.SAMPLED"):
            graded(Sinkhorn(), student, TeacherSignal(logp=logp, ids=ids, support=support))
    kept = top(teacher, 3, temperature=2.0)
    with pytest.raises(ValueError, match=r"Sinkhorn accepts Support.FULL, the teacher gives Support.TOPK"):
        graded(Sinkhorn(debiased=True), student, kept)
    with pytest.raises(ValueError, match="the top 4 are asked for, the teacher's signal holds 3"):
        graded(Sinkhorn(top_k=4), student, kept)
    with pytest.raises(ValueError, match=f"the top {V + 1} are asked for, the teacher's signal holds {V}"):
        graded(Sinkhorn(top_k=V + 1), student, teacher)
    with pytest.raises(ValueError, match=r"captured at temperature 1.0 cannot be re-tempered to 2.0"):
        graded(Sinkhorn(), student, top(teacher, 3))
    with pytest.raises(ValueError, match="the teacher speaks of 4 rows, the student of 6"):
        graded(Sinkhorn(), student, teacher[:4])
    with pytest.raises(ValueError, match="positions with weights cannot be transported"):
        graded(Sinkhorn(), student, teacher, weight=torch.ones(N))


def test_calls_without_a_teacher_or_rows_are_refused() -> None:
    student, teacher, labels = logits(N, vocab=V)
    with pytest.raises(ValueError, match="Sinkhorn compares two models: give teacher_logits"):
        Sinkhorn().on_logits(student)
    with pytest.raises(ValueError, match="Sinkhorn needs a teacher's signal"):
        Sinkhorn()(signal(student, Head(weight=torch.eye(V).double())), None)
    for nothing in ({"mask": torch.zeros(N, dtype=torch.bool)}, {"labels": torch.full((N,), -100)}):
        with pytest.raises(ValueError, match="no row is scored: mask or labels leave out all of them"):
            Sinkhorn().on_logits(student, teacher, **nothing)
    with pytest.raises(ValueError, match=r"teacher_logits covers positions \(4,\), student_logits \(6,\)"):
        Sinkhorn().on_logits(student, teacher[:4], labels=labels)


def test_geometry_sample_asks_for_token_vectors() -> None:
    student, teacher, _ = logits(N, vocab=V)
    with pytest.raises(ValueError, match=r"use SinkhornTrainer, or Sinkhorn\(...\).over\(TokenPoints\(...\)\)"):
        graded(Sinkhorn(geometry="sample"), student, teacher)
    with pytest.raises(ValueError, match="geometry sample moves mass between tokens: give points, a TokenPoints"):
        Sinkhorn(geometry="sample").on_logits(student, teacher)
    points = TokenPoints(student=torch.randn(V, 3, generator=torch.Generator().manual_seed(0)))
    assert Sinkhorn(geometry="sample").on_logits(student, teacher, points=points).count == N

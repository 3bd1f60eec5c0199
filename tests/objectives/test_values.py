"""Values and gradients of every objective on logits, against the formulas in ``oracle``."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlib.objectives import (
    AdaptiveKL,
    AlphaBeta,
    CrossEntropy,
    DecoupledTopK,
    ForwardKL,
    GeneralizedJSD,
    LKHybrid,
    PlackettLuce,
    ReverseKL,
    RowObjective,
    SampledReverseKL,
    SelectiveKL,
    SkewKL,
    Sum,
    TotalVariation,
)
from kdlib.types import Loss
from tests.objectives import oracle
from tests.objectives.cases import CASES, DIVERGENCES, logits

INF = torch.inf
every_case = pytest.mark.parametrize("objective", CASES.values(), ids=CASES)
every_divergence = pytest.mark.parametrize("objective", DIVERGENCES.values(), ids=DIVERGENCES)


def graded(
    objective: RowObjective, s: Tensor, z: Tensor, *, labels: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Loss, Tensor]:
    student = s.detach().clone().requires_grad_()
    loss = objective.on_logits(student, z, labels=labels, mask=mask)
    return loss, torch.autograd.grad(loss.sum, student)[0]


def assert_close(found: Tensor, wanted: Tensor, *, tolerance: float) -> None:
    """Relative Frobenius error."""
    assert found.isfinite().all()
    assert (found.double() - wanted).norm() <= tolerance * wanted.norm() + 1e-9


# Against the oracle -------------------------------------------------------------------------------


def test_the_oracles_two_ways_to_a_gradient_agree() -> None:
    student, teacher, _ = logits(2)
    for objective in DIVERGENCES.values():
        for s, z in zip(student.tolist(), teacher.tolist(), strict=True):
            assert oracle.gradient(objective, s, z) == pytest.approx(oracle.numeric_gradient(objective, s, z), abs=1e-8)


# of value and gradient; 16-bit logits: the exact formula on rounded inputs, with a gradient rounded once
TOLERANCES = {torch.float64: (1e-11, 1e-7), torch.float32: (5e-6, 5e-6), torch.bfloat16: (5e-6, 4e-3)}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@every_case
def test_value_and_gradient(objective: RowObjective, dtype: torch.dtype) -> None:
    student, teacher, labels = logits(6)
    student, teacher = student.to(dtype), teacher.to(dtype)
    loss, gradient = graded(objective, student, teacher, labels=labels)
    value, wanted = oracle.batch(objective, student, teacher, labels=labels)
    of_value, of_gradient = TOLERANCES[dtype]
    assert loss.sum.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.sum.item() == pytest.approx(value, rel=of_value)
    assert gradient.dtype == dtype
    assert_close(gradient, wanted, tolerance=of_gradient)


@pytest.mark.parametrize("t_squared", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 3.0])
@every_divergence
def test_temperature_divides_both_logits(objective: RowObjective, temperature: float, t_squared: bool) -> None:
    student, teacher, labels = logits(3)
    tempered = replace(objective, temperature=temperature, t_squared=t_squared)
    loss, gradient = graded(tempered, student, teacher, labels=labels)
    value, wanted = oracle.batch(tempered, student, teacher, labels=labels)
    assert loss.sum.item() == pytest.approx(value, rel=1e-10)
    assert_close(gradient, wanted, tolerance=1e-6)
    plain = replace(objective, temperature=1.0).on_logits(student / temperature, teacher / temperature)
    assert loss.sum.item() == pytest.approx(plain.sum.item() * (temperature**2 if t_squared else 1.0))


def test_plackett_luce_tempers_its_weights_by_both() -> None:
    student, teacher, labels = logits(3)
    objective = PlackettLuce(top_k=5, temperature=2.0, tau=1.5, t_squared=True)
    loss, gradient = graded(objective, student, teacher, labels=labels)
    value, wanted = oracle.batch(objective, student, teacher, labels=labels)
    assert loss.sum.item() == pytest.approx(value)
    assert_close(gradient, wanted, tolerance=1e-6)


def test_the_first_plackett_luce_term_is_weighted_cross_entropy() -> None:
    student, teacher, labels = logits(4)
    loss = PlackettLuce(top_k=1).on_logits(student, teacher, labels=labels)
    rows = torch.arange(4)
    weighted = -(teacher.softmax(-1)[rows, labels] * student.log_softmax(-1)[rows, labels])
    assert loss.sum.item() == pytest.approx(weighted.sum().item())


# a stopped gradient is no derivative of the value: for these the oracle's frozen differences are the check
STOPPED = (
    *("adaptive_kl", "adaptive_kl_0.8", "interpolated", "taid", "sampled_reverse_kl", "sampled_reverse_kl_k3"),
    *("lk_hybrid", "lk_hybrid_40"),
)


@pytest.mark.parametrize("name", [name for name in CASES if name not in STOPPED])
def test_gradcheck(name: str) -> None:
    objective, (student, teacher, labels) = CASES[name], logits(3, vocab=6, seed=5)
    assert torch.autograd.gradcheck(lambda s: objective.on_logits(s, teacher, labels=labels).sum, student.requires_grad_())


# Infinities, gaps ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_case
def test_columns_that_neither_side_can_emit_change_nothing(objective: RowObjective, dtype: torch.dtype) -> None:
    student, teacher, labels = logits(4, vocab=9)
    student, teacher, labels = student.to(dtype), teacher.to(dtype), labels % 6
    closed = [x.clone() for x in (student, teacher)]
    for x in closed:
        x[:, 6:] = -INF
    loss, gradient = graded(objective, *closed, labels=labels)
    wanted, of_wanted = graded(objective, student[:, :6], teacher[:, :6], labels=labels)
    assert loss.sum.item() == pytest.approx(wanted.sum.item(), rel=1e-5)
    assert (gradient[:, 6:] == 0).all()
    torch.testing.assert_close(gradient[:, :6], of_wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", ["student", "teacher"])
@every_case
def test_a_column_that_one_side_cannot_emit(objective: RowObjective, side: str, dtype: torch.dtype) -> None:
    student, teacher, labels = logits(4)
    student, teacher = student.to(dtype), teacher.to(dtype)
    (student if side == "student" else teacher)[:, 2] = -INF
    labels = torch.full_like(labels, 2 if side == "student" else 3)
    loss, gradient = graded(objective, student, teacher, labels=labels)
    triples = zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)
    value = math.fsum(oracle.value(objective, s, z, label=y) for s, z, y in triples)
    assert loss.sum.item() == pytest.approx(value, rel=1e-5)
    assert gradient.isfinite().all()


def test_where_the_teacher_is_impossible_reverse_kl_is_infinite_and_pulls_away() -> None:
    student, teacher, _ = logits(3)
    teacher[:, 2] = -INF
    loss, gradient = graded(ReverseKL(), student, teacher)
    assert loss.sum.item() == math.inf
    assert (gradient[:, 2] > 100).all() and gradient.isfinite().all()


def test_where_the_student_is_impossible_forward_kl_is_infinite_and_its_gradient_is_q_minus_p() -> None:
    student, teacher, _ = logits(3)
    student[:, 2] = -INF
    loss, gradient = graded(ForwardKL(), student, teacher)
    assert loss.sum.item() == math.inf
    torch.testing.assert_close(gradient, student.softmax(-1) - teacher.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@every_case
def test_gaps_of_200_nats(objective: RowObjective, dtype: torch.dtype) -> None:
    student, teacher, _ = (x.to(dtype) if x.is_floating_point() else x for x in logits(4, scale=1.0))
    student[:, 1] -= 200.0
    teacher[:, 4] -= 200.0
    student[0, 5] += 200.0
    labels = torch.tensor([1, 4, 0, 2])
    loss, gradient = graded(objective, student, teacher, labels=labels)
    assert gradient.isfinite().all()
    negative = isinstance(objective, AlphaBeta) and min(objective.alpha, objective.beta) < 0
    value, wanted = oracle.batch(objective, student, teacher, labels=labels)
    overflows = negative or (isinstance(objective, SampledReverseKL) and objective.estimator == "k3")
    if overflows and dtype == torch.float32 and value > 1e30:
        assert loss.sum.item() == math.inf
        return
    assert loss.sum.item() == pytest.approx(value, rel=1e-5)
    if not negative:  # the oracle's differences lose a gradient of e^60
        assert_close(gradient, wanted, tolerance=1e-5)


@pytest.mark.parametrize("padded", ["student", "teacher"])
@every_case
def test_padded_vocabularies_are_cut_to_the_smaller(objective: RowObjective, padded: str) -> None:
    student, teacher, labels = logits(4)
    wanted, of_wanted = graded(objective, student, teacher, labels=labels)
    extra = torch.full((4, 3), 5.0, dtype=torch.float64)
    pair = [student, teacher]
    pair[padded == "teacher"] = torch.cat([pair[padded == "teacher"], extra], -1)
    loss, gradient = graded(objective, *pair, labels=labels)
    assert loss.sum.item() == wanted.sum.item()
    assert torch.equal(gradient[:, :7], of_wanted) and (gradient[:, 7:] == 0).all()


# Which rows count ---------------------------------------------------------------------------------


@every_case
def test_nothing_scored_is_a_zero_that_backward_works_on(objective: RowObjective) -> None:
    student, teacher, _ = logits(4)
    for hidden in ({"mask": torch.zeros(4)}, {"labels": torch.full((4,), -100)}):
        labels = hidden.get("labels", torch.zeros(4, dtype=torch.long))
        loss, gradient = graded(objective, student, teacher, labels=labels, mask=hidden.get("mask"))
        assert (loss.sum.item(), loss.count) == (0.0, 0)
        assert (gradient == 0).all()


@every_case
def test_labels_and_mask_choose_rows_of_any_batch_shape(objective: RowObjective) -> None:
    student, teacher, labels = logits(6)
    labels[1], mask = -100, torch.tensor([1, 1, 0, 1, 1, 1])
    kept = [0, 3, 4, 5]
    wanted, of_wanted = graded(objective, student[kept], teacher[kept], labels=labels[kept])
    loss, gradient = graded(
        objective,
        student.view(2, 3, 7),
        teacher.view(2, 3, 7),
        labels=labels.view(2, 3),
        mask=mask.view(2, 3),
    )
    assert loss.count == 4
    assert loss.sum.item() == pytest.approx(wanted.sum.item(), rel=1e-12)
    torch.testing.assert_close(gradient.view(6, 7)[kept], of_wanted)
    assert (gradient.view(6, 7)[[1, 2]] == 0).all()


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, _ = logits(3)
    teacher.requires_grad_()
    ForwardKL().on_logits(student.requires_grad_(), teacher).sum.backward()
    assert teacher.grad is None and student.grad is not None


def test_metrics_are_sums_over_the_scored_rows() -> None:
    student, teacher, labels = logits(5)
    labels[2] = -100
    found = TotalVariation().on_logits(student, teacher, labels=labels).metrics
    rows = [(s, z) for i, (s, z) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)) if i != 2]
    pairs = [(oracle.softmax(s), oracle.softmax(z)) for s, z in rows]
    wanted = {
        "kl_forward": sum(oracle.kl(p, q) for q, p in pairs),
        "kl_reverse": sum(oracle.kl(q, p) for q, p in pairs),
        "entropy_teacher": sum(oracle.entropy(p) for _, p in pairs),
        "entropy_student": sum(oracle.entropy(q) for q, _ in pairs),
        "top1_agreement": sum(oracle.best(q, 1) == oracle.best(p, 1) for q, p in pairs),
        "acceptance": sum(oracle.acceptance(p, q) for q, p in pairs),
        "acceptance_greedy": sum(p[oracle.best(q, 1)[0]] for q, p in pairs),
    }
    assert {name: total.item() for name, (total, _) in found.items()} == pytest.approx(wanted)
    assert {count for _, count in found.values()} == {4}


# Properties ---------------------------------------------------------------------------------------


@every_divergence
def test_equal_models_have_no_loss_and_no_gradient(objective: RowObjective) -> None:
    student, _, _ = logits(5)
    student[:, 3] -= 60.0
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        loss, gradient = graded(objective, student.to(dtype), student.to(dtype))
        assert abs(loss.sum.item()) <= tolerance
        assert gradient.abs().max() <= tolerance


finite = st.integers(-240, 240).map(lambda eighths: eighths / 8)  # sums are exact, so that a shift breaks no tie of a top k
rows = st.lists(finite, min_size=5, max_size=5)


@pytest.mark.parametrize("objective", DIVERGENCES.values(), ids=DIVERGENCES)
@settings(max_examples=25, deadline=None)
@given(s=rows, z=rows, shift=finite)
def test_divergences_are_never_negative_and_see_no_shift(
    objective: RowObjective, s: list[float], z: list[float], shift: float
) -> None:
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in (s, z))
    plain, moved = (
        objective.on_logits(student, teacher),
        objective.on_logits(student + shift, teacher - shift),
    )
    assert plain.sum.item() >= -1e-12
    assert moved.sum.item() == pytest.approx(plain.sum.item(), rel=1e-6, abs=1e-9)


@every_case
@settings(max_examples=5, deadline=None)
@given(cut=st.integers(0, 8))
def test_a_loss_is_the_sum_of_its_rows_however_they_are_cut(objective: RowObjective, cut: int) -> None:
    student, teacher, labels = logits(8)
    parts = [objective.on_logits(student[part], teacher[part], labels=labels[part]) for part in (slice(0, cut), slice(cut, 8))]
    whole = objective.on_logits(student, teacher, labels=labels)
    assert sum(part.sum.item() for part in parts) == pytest.approx(whole.sum.item(), rel=1e-12)
    assert sum(part.count for part in parts) == whole.count == 8


# Wrong use ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ForwardKL(temperature=0.0), "temperature must be above 0"),
        (lambda: GeneralizedJSD(beta=1.5), "between 0 and 1"),
        (lambda: SkewKL(alpha=1.0), "below 1"),
        (lambda: AlphaBeta(alpha=0.0, beta=-1.0), "above 0, or both 0"),
        (lambda: AdaptiveKL(mu=1.0), "between 0 and 1"),
        (lambda: CrossEntropy(temperature=2.0), "temperature 1"),
        (lambda: DecoupledTopK(k=0), "k >= 1"),
        (lambda: PlackettLuce(tau=0.0), "tau > 0"),
        (lambda: SampledReverseKL(temperature=2.0), "temperature 1"),
        (lambda: SampledReverseKL(importance_clip=0.5), "at least 1"),
        (lambda: SampledReverseKL(estimator="k2"), "k1 or k3"),  # type: ignore[arg-type]
        (lambda: LKHybrid(eta=-1.0), "eta must be 0 or more"),
        (lambda: SelectiveKL(fraction=0.0), "above 0 and at most 1"),
        (lambda: SelectiveKL(fraction=1.5), "above 0 and at most 1"),
        (lambda: SelectiveKL(normalize="rows"), "kept or all"),  # type: ignore[arg-type]
        (lambda: Sum(), "needs parts"),
        (lambda: Sum(parts=((1.0, ForwardKL()),), temperature=2.0), "on the parts"),
    ],
)
def test_options_without_meaning_are_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_what_an_objective_lacks_is_named() -> None:
    student, teacher, labels = logits(3)
    with pytest.raises(ValueError, match="ForwardKL compares two models"):
        ForwardKL().on_logits(student)
    with pytest.raises(ValueError, match="CrossEntropy needs labels"):
        CrossEntropy().on_logits(student)
    with pytest.raises(ValueError, match="Sum needs labels"):
        Sum(parts=((1.0, CrossEntropy()),)).on_logits(student)
    with pytest.raises(ValueError, match="teacher_logits covers positions"):
        ForwardKL().on_logits(student, teacher[:2])
    with pytest.raises(ValueError, match="labels covers positions"):
        ForwardKL().on_logits(student, teacher, labels=labels[None])

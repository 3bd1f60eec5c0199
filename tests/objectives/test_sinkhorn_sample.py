"""Sample-wise Sinkhorn against POT on the tokens of each row, and against plain autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import ot
import pytest
import torch
from torch import Tensor

from kdlib.kernels import linear_objective, row_values
from kdlib.objectives import Sinkhorn
from kdlib.objectives.sinkhorn import SampleTransport, TokenPoints
from kdlib.types import Head, Positions, StudentSignal, Support, TeacherSignal
from tests.objectives import oracle, sinkhorn_oracle
from tests.objectives.cases import logits
from tests.objectives.test_supports import top
from tests.objectives.test_values import graded

N, V, F = 5, 9, 4
VECTORS, OTHERS = torch.randn(2, 12, F, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
SHARED = TokenPoints(student=VECTORS[:V])

token_costs = pytest.mark.parametrize("token_cost", ["cosine", "sqeuclidean", "l1"])
losses = pytest.mark.parametrize("loss", ["transport", "dual"])
plain_or_debiased = pytest.mark.parametrize("debiased", [False, True], ids=["plain", "debiased"])


def sample(points: TokenPoints = SHARED, **options: Any) -> SampleTransport:
    return Sinkhorn(**{"geometry": "sample", "top_k": 3, **options}).over(points)


def distances(x: Tensor, a: list[int], y: Tensor, b: list[int], cost: str) -> np.ndarray[Any, Any]:
    """C [a, b] by numpy's definitions."""
    u, v = x[a].numpy(), y[b].numpy()
    if cost == "l1":
        u, v = (z / np.abs(z).sum(-1, keepdims=True) for z in (u, v))
        return np.abs(u[:, None] - v).sum(-1)
    u, v = (z / np.sqrt((z * z).sum(-1, keepdims=True)) for z in (u, v))
    return ((u[:, None] - v) ** 2).sum(-1) if cost == "sqeuclidean" else 1.0 - u @ v.T


def masses(p: list[float], ids: list[int]) -> np.ndarray[Any, Any]:
    kept = np.array([p[i] for i in ids])
    return kept / kept.sum()


def tokens_of(objective: SampleTransport, q: list[float], p: list[float]) -> tuple[list[int], list[int]]:
    """The tokens of both sides: the union of both top-k, or each side's own where the vocabularies differ."""
    k = objective.options.tokens
    a, b = oracle.best(q, k), oracle.best(p, k)
    return (a, b) if objective.points.teacher is not None else (sorted({*a, *b}),) * 2


def by_pot(objective: SampleTransport, s: list[float], z: list[float]) -> float:
    """The loss of one row, by POT."""
    options, x = objective.options, objective.points.student
    y = x if objective.points.teacher is None else objective.points.teacher
    q, p = oracle.softmax(s, options.temperature), oracle.softmax(z, options.temperature)
    a, b = tokens_of(objective, q, p)

    def moved(u: Tensor, i: list[int], v: Tensor, j: list[int], of: list[float], onto: list[float]) -> float:
        C, source, target = distances(u, i, v, j, options.token_cost), masses(of, i), masses(onto, j)
        if options.loss == "dual":
            return ot.solve(C, source, target, reg=options.epsilon, reg_type="KL", max_iter=3_000, tol=1e-11).value
        plan = ot.sinkhorn(source, target, C, options.epsilon, method="sinkhorn_log", numItermax=3_000, stopThr=1e-11)
        return float((plan * C).sum())

    value = moved(x, a, y, b, q, p)
    if options.debiased:
        value -= 0.5 * moved(x, a, x, a, q, q) + 0.5 * moved(y, b, y, b, p, p)
    return value


def plain(objective: SampleTransport, student: Tensor, teacher: Tensor) -> Tensor:
    """The sum of the rows in torch, with the iterations outside the log domain."""
    options, x = objective.options, objective.points.student
    y = x if objective.points.teacher is None else objective.points.teacher
    total = student.new_zeros(())
    for s, z in zip(student, teacher, strict=True):
        q, p = (s / options.temperature).softmax(-1), (z / options.temperature).softmax(-1)
        a, b = tokens_of(objective, q.tolist(), p.tolist())
        source, target = q[a] / q[a].sum(), p[b] / p[b].sum()
        sides = {"qp": (x, a, y, b, source, target), "qq": (x, a, x, a, source, source), "pp": (y, b, y, b, target, target)}
        value = {
            name: sinkhorn_oracle.plain_moved(options, torch.from_numpy(distances(*side[:4], options.token_cost)), *side[4:])
            for name, side in sides.items()
        }
        total = total + value["qp"] - (0.5 * value["qq"] + 0.5 * value["pp"] if options.debiased else 0.0)
    return total


# Against POT and plain autograd -------------------------------------------------------------------------


@token_costs
@losses
@plain_or_debiased
def test_rows_are_those_of_pot(token_cost: Any, loss: Any, debiased: bool) -> None:
    student, teacher, _ = logits(N, vocab=V)
    epsilon = 1.5 if debiased else 0.4  # from a set onto itself POT is slow to converge
    objective = sample(token_cost=token_cost, loss=loss, debiased=debiased, epsilon=epsilon, iterations=150)
    wanted = [by_pot(objective, s, z) for s, z in zip(student.tolist(), teacher.tolist(), strict=True)]
    signal, said = signals(student, teacher)
    with torch.no_grad():
        rows = row_values(signal, said, objective)
        total = objective.on_logits(student, teacher)
    assert rows.tolist() == pytest.approx(wanted, abs=1e-8)
    assert total.count == N and total.sum.item() == pytest.approx(sum(wanted), abs=1e-8)


def signals(student: Tensor, teacher: Tensor | TeacherSignal) -> tuple[StudentSignal, TeacherSignal]:
    """An identity head hands the logits on."""
    rows = torch.arange(len(student))
    signal = StudentSignal(
        hidden=student,
        head=Head(weight=torch.eye(student.shape[-1], dtype=student.dtype)),
        positions=Positions(index=rows, labels=rows * 0, sequence=rows * 0),
    )
    return signal, teacher if isinstance(teacher, TeacherSignal) else TeacherSignal(logits=teacher)


@token_costs
@losses
@plain_or_debiased
@pytest.mark.parametrize("iterations", [1, 8])
def test_values_and_gradients_are_those_of_the_plain_formula(
    token_cost: Any, loss: Any, debiased: bool, iterations: int
) -> None:
    student, teacher, _ = logits(N, vocab=V)
    objective = sample(token_cost=token_cost, loss=loss, debiased=debiased, epsilon=0.2, iterations=iterations)
    found, gradient = graded(objective, student, teacher)
    wanted = plain(objective, student.requires_grad_(), teacher)
    torch.testing.assert_close(found.sum, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, student)[0], rtol=1e-8, atol=1e-10)
    assert gradient.abs().max() > 1e-4


@plain_or_debiased
@pytest.mark.parametrize("two", [False, True], ids=["shared", "two_vocabularies"])
def test_gradcheck(debiased: bool, two: bool) -> None:
    student, teacher, _ = logits(2, vocab=5)
    points = TokenPoints(student=VECTORS, teacher=OTHERS if two else None)
    for options in ({"iterations": 3}, {"iterations": 60, "loss": "dual", "epsilon": 2.0}):
        objective = sample(points, debiased=debiased, **options)
        assert torch.autograd.gradcheck(lambda s, o=objective: o.on_logits(s, teacher).sum, student.requires_grad_())


@token_costs
@losses
@plain_or_debiased
def test_two_vocabularies_of_different_size(token_cost: Any, loss: Any, debiased: bool) -> None:
    student, teacher = logits(N, vocab=V)[0], logits(N, vocab=12, seed=3)[1]
    points = TokenPoints(student=VECTORS[:V], teacher=OTHERS)
    epsilon = 1.5 if debiased else 0.4
    objective = sample(points, token_cost=token_cost, loss=loss, debiased=debiased, epsilon=epsilon, iterations=150)
    wanted = sum(by_pot(objective, s, z) for s, z in zip(student.tolist(), teacher.tolist(), strict=True))
    signal, said = signals(student, teacher)
    assert linear_objective(signal, said, objective).sum.item() == pytest.approx(wanted, abs=1e-8)
    few = replace(objective, options=replace(objective.options, iterations=4, loss="transport"))
    found, gradient = graded(few, student, teacher)
    (of_plain,) = torch.autograd.grad(plain(few, student.requires_grad_(), teacher), student)
    assert found.metrics == {}  # none that compare id with id
    torch.testing.assert_close(gradient, of_plain, rtol=1e-8, atol=1e-10)


# Which tokens --------------------------------------------------------------------------------------------


def favouring(*ids: int) -> Tensor:
    """Logits [1, V] whose top 3 are ``ids``, in that order."""
    row = torch.linspace(-1.0, -2.0, V, dtype=torch.float64)
    row[list(ids)] = torch.tensor([2.0, 1.5, 1.1], dtype=torch.float64)
    return row[None]


SUPPORTS = {"identical": (2, 0, 1), "overlapping": (4, 1, 7), "disjoint": (6, 5, 8)}


@pytest.mark.parametrize("theirs", SUPPORTS.values(), ids=SUPPORTS)
@losses
def test_the_union_of_both_supports(theirs: tuple[int, ...], loss: Any) -> None:
    student, teacher = favouring(0, 1, 2), favouring(*theirs)
    objective = sample(loss=loss, epsilon=0.3, iterations=150)
    union = {0, 1, 2, *theirs}
    found, gradient = graded(objective, student, teacher)
    assert found.sum.item() == pytest.approx(by_pot(objective, student[0].tolist(), teacher[0].tolist()), abs=1e-8)
    assert set((gradient[0].abs() > 1e-9).nonzero().flatten().tolist()) == union


def test_all_tokens_are_as_many_as_there_are() -> None:
    student, teacher, _ = logits(N, vocab=V)
    everything, gradient = graded(sample(top_k=V), student, teacher)
    more, of_more = graded(sample(top_k=None), student, teacher)  # 32
    assert Sinkhorn(geometry="sample").tokens == 32
    torch.testing.assert_close(more.sum, everything.sum)
    torch.testing.assert_close(of_more, gradient)


@plain_or_debiased
def test_tokens_that_a_top_k_teacher_says_nothing_of_have_no_mass_there(debiased: bool) -> None:
    student, teacher, _ = logits(N, vocab=V)
    objective = sample(debiased=debiased, epsilon=1.5, iterations=80)
    kept = top(teacher, 2, temperature=2.0)
    assert kept.ids is not None
    leaf = student.clone().requires_grad_()
    found = linear_objective(*signals(leaf, kept), objective)
    total = sum(by_union(objective, s, p, ids) for s, p, ids in zip(student, teacher, kept.ids.tolist(), strict=True))
    assert found.sum.item() == pytest.approx(total, abs=1e-8)
    # and two tokens of either are those of a dense teacher that has no others
    silent = torch.full_like(teacher, -torch.inf).scatter(-1, kept.ids, teacher.gather(-1, kept.ids))
    found = linear_objective(*signals(leaf, kept), sample(debiased=debiased, top_k=2))
    wanted, gradient = graded(sample(debiased=debiased, top_k=2), student, silent)
    torch.testing.assert_close(found.sum, wanted.sum)
    torch.testing.assert_close(torch.autograd.grad(found.sum, leaf)[0], gradient)


def by_union(objective: SampleTransport, s: Tensor, z: Tensor, known: list[int]) -> float:
    """One row by POT, with the teacher's mass on ``known`` alone."""
    options, x = objective.options, objective.points.student
    q, p = oracle.softmax(s.tolist(), 2.0), oracle.softmax(z.tolist(), 2.0)
    a = sorted({*oracle.best(q, options.tokens), *known})
    sides = {"q": (a, masses(q, a)), "p": (known, masses(p, known))}
    value = {}
    for u, v in ("qp", "qq", "pp"):
        (i, source), (j, target) = sides[u], sides[v]
        C = distances(x, i, x, j, options.token_cost)
        value[u + v] = float(
            (ot.sinkhorn(source, target, C, options.epsilon, method="sinkhorn_log", numItermax=3_000, stopThr=1e-11) * C).sum()
        )
    return value["qp"] - (0.5 * value["qq"] + 0.5 * value["pp"] if options.debiased else 0.0)


def test_a_top_k_teacher_that_knows_enough_is_the_dense_one() -> None:
    student, teacher, _ = logits(N, vocab=V)
    dense, gradient = graded(sample(), student, teacher)
    leaf = student.clone().requires_grad_()
    found = linear_objective(*signals(leaf, top(teacher, V, temperature=2.0)), sample())
    torch.testing.assert_close(found.sum, dense.sum)
    torch.testing.assert_close(torch.autograd.grad(found.sum, leaf)[0], gradient)


@losses
@token_costs
def test_debiased_it_is_zero_with_zero_gradient_where_both_agree(loss: Any, token_cost: Any) -> None:
    student, _, _ = logits(N, vocab=V)
    found, gradient = graded(sample(debiased=True, loss=loss, token_cost=token_cost), student, student)
    assert abs(found.sum.item()) < 1e-12 and gradient.abs().max() < 1e-12


# Chunks, precision, refusals --------------------------------------------------------------------------


@plain_or_debiased
@pytest.mark.parametrize("vocab", [V, 12], ids=["same", "teacher_padded"])
def test_a_head_over_chunks_is_on_logits(debiased: bool, vocab: int) -> None:
    student, teacher = logits(270, vocab=V)[0], logits(270, vocab=vocab, seed=1)[1]
    objective = sample(debiased=debiased, iterations=2)
    leaf = student.clone().requires_grad_()
    found = linear_objective(*signals(leaf, teacher), objective)
    wanted, gradient = graded(objective, student, teacher)
    torch.testing.assert_close(found.sum, wanted.sum)
    torch.testing.assert_close(torch.autograd.grad(found.sum, leaf)[0], gradient)
    assert found.count == wanted.count == 270


def test_token_vectors_gathered_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, _ = logits(N, vocab=V)
    wanted, gradient = graded(sample(), student, teacher)
    monkeypatch.setattr("kdlib.objectives.sinkhorn.sample.GATHERED", 2 * 12 * F)
    found, of_found = graded(sample(), student, teacher)
    torch.testing.assert_close(found.sum, wanted.sum)
    torch.testing.assert_close(of_found, gradient)


@token_costs
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_inputs_of_low_precision_are_widened(token_cost: Any, dtype: torch.dtype) -> None:
    student, teacher, _ = logits(N, vocab=V, seed=2)
    student, teacher, vectors = (z.to(dtype) for z in (student, teacher, VECTORS[:V]))
    objective = sample(TokenPoints(student=vectors), token_cost=token_cost)
    exact = sample(TokenPoints(student=vectors.double()), token_cost=token_cost)
    (loss, gradient), (wanted, of_wanted) = (
        graded(objective, student, teacher),
        graded(exact, student.double(), teacher.double()),
    )
    assert loss.sum.dtype == torch.float32 and gradient.dtype == dtype
    assert loss.sum.item() == pytest.approx(wanted.sum.item(), rel=2e-5)
    assert (gradient.double() - of_wanted).norm() <= (4e-3 if dtype == torch.bfloat16 else 2e-4) * of_wanted.norm()


@token_costs
def test_autocast_does_not_round_distances(token_cost: Any) -> None:
    student, teacher = (z.float() for z in logits(N, vocab=V)[:2])
    objective = sample(TokenPoints(student=VECTORS[:V].float()), token_cost=token_cost)
    outside = objective.on_logits(student, teacher).sum
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective.on_logits(student, teacher).sum
    assert inside.item() == outside.item()


def test_peaked_rows_stay_finite() -> None:
    student, teacher, _ = logits(N, vocab=V, scale=200.0)
    teacher[:, 0] = -torch.inf
    for debiased in (False, True):
        loss, gradient = graded(sample(debiased=debiased), student.float(), teacher.float())
        assert loss.sum.isfinite() and gradient.isfinite().all()


def test_token_vectors_of_a_smaller_vocabulary_are_refused() -> None:
    student, teacher, _ = logits(N, vocab=V)
    with pytest.raises(ValueError, match=f"the student's vocabulary has {V} tokens, the token vectors are of {V - 1}"):
        sample(TokenPoints(student=VECTORS[: V - 1])).on_logits(student, teacher)
    points = TokenPoints(student=VECTORS, teacher=OTHERS[: V - 2])
    with pytest.raises(ValueError, match=f"the teacher's vocabulary has {V} tokens, the token vectors are of {V - 2}"):
        sample(points).on_logits(student, teacher)


def test_sampled_teachers_and_calls_without_a_teacher_are_refused() -> None:
    student, teacher, _ = logits(N, vocab=V)
    logp, ids = teacher.log_softmax(-1).topk(3)
    for support in (Support.SAMPLED_TEACHER, Support.SAMPLED_STUDENT):
        drawn = TeacherSignal(logp=logp, ids=ids, support=support)
        with pytest.raises(ValueError, match=r"SampleTransport accepts .*, the teacher gives Support.SAMPLED"):
            linear_objective(*signals(student, drawn), sample())
    with pytest.raises(ValueError, match="compares two models: give teacher_logits"):
        sample().on_logits(student)

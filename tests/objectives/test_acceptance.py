"""The losses of the acceptance rate: what they are in special cases, and where their gradient must not die."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kdlib.kernels.metrics import row_metrics
from kdlib.objectives import CrossEntropy, ForwardKL, LKHybrid, NegLogAcceptance, RowObjective, TotalVariation
from kdlib.types import DenseView, Support, TeacherSignal
from tests.objectives import oracle
from tests.objectives.cases import logits
from tests.objectives.test_supports import top
from tests.objectives.test_values import graded


def rows(objective: RowObjective, student: Tensor, teacher: Tensor) -> list[float]:
    return [objective.on_logits(s[None], z[None]).sum.item() for s, z in zip(student, teacher, strict=True)]


def alphas(student: Tensor, teacher: Tensor) -> list[float]:
    pairs = zip(student.tolist(), teacher.tolist(), strict=True)
    return [oracle.acceptance(oracle.softmax(z), oracle.softmax(s)) for s, z in pairs]


def test_total_variation_is_what_is_not_accepted() -> None:
    student, teacher, _ = logits(8)
    alpha = alphas(student, teacher)
    assert rows(TotalVariation(), student, teacher) == pytest.approx([1 - a for a in alpha])
    assert rows(NegLogAcceptance(), student, teacher) == pytest.approx([-math.log(a) for a in alpha])


def test_a_one_hot_teacher_gives_cross_entropy() -> None:
    student, _, labels = logits(6)
    certain = torch.full_like(student, -torch.inf).scatter(-1, labels[:, None], 0.0)
    loss, gradient = graded(NegLogAcceptance(), student, certain)
    wanted, of_wanted = graded(CrossEntropy(), student, certain, labels=labels)
    torch.testing.assert_close(loss.sum, wanted.sum)
    torch.testing.assert_close(gradient, of_wanted)


def test_its_gradient_is_that_of_total_variation_over_alpha() -> None:
    student, teacher, _ = logits(6)
    _, of_loss = graded(NegLogAcceptance(), student, teacher)
    _, of_variation = graded(TotalVariation(), student, teacher)
    torch.testing.assert_close(of_loss, of_variation / torch.tensor(alphas(student, teacher), dtype=torch.float64)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("gap", [30.0, 200.0])  # alpha about e^-30 and e^-200, which float32 holds as 0
def test_where_almost_nothing_is_accepted_the_gradient_is_as_strong_as_anywhere(gap: float, dtype: torch.dtype) -> None:
    teacher, student = torch.zeros(1, 6, dtype=dtype), torch.zeros(1, 6, dtype=dtype)
    teacher[:, :3] += gap
    student[:, 3:] += gap
    loss, gradient = graded(NegLogAcceptance(), student, teacher)
    assert loss.sum.item() == pytest.approx(gap - math.log(2.0))  # min(p, q) = e^-gap / 3 for each of six
    wanted = torch.tensor([[-1 / 6] * 3 + [1 / 6] * 3], dtype=dtype)  # w = 1/6; q < p for the first three
    torch.testing.assert_close(gradient, wanted)
    assert graded(TotalVariation(), student, teacher)[1].abs().max() < 1e-7


def test_without_a_common_outcome_it_is_infinite_and_pulls_as_forward_kl() -> None:
    student, teacher, _ = logits(3)
    student[1, :4], teacher[1, 4:] = -torch.inf, -torch.inf
    loss, gradient = graded(NegLogAcceptance(), student, teacher)
    assert loss.sum.item() == math.inf
    torch.testing.assert_close(gradient[1], student[1].softmax(-1) - teacher[1].softmax(-1))
    _, of_others = graded(NegLogAcceptance(), student[[0, 2]], teacher[[0, 2]])
    torch.testing.assert_close(gradient[[0, 2]], of_others)


def test_the_hybrids_ends_are_kl_and_total_variation() -> None:
    student, teacher, _ = logits(6)
    for eta, end in ((0.0, ForwardKL()), (1e6, TotalVariation())):
        loss, gradient = graded(LKHybrid(eta=eta), student, teacher)
        wanted, of_wanted = graded(end, student, teacher)
        torch.testing.assert_close(loss.sum, wanted.sum)
        torch.testing.assert_close(gradient, of_wanted)


def test_the_hybrid_is_kl_where_nothing_is_accepted() -> None:
    student, teacher, _ = logits(4, scale=1.0)
    student[:, :3] += 60.0
    teacher[:, 3:] += 60.0
    torch.testing.assert_close(graded(LKHybrid(), student, teacher)[1], graded(ForwardKL(), student, teacher)[1])


def test_an_infinite_kl_stays_infinite_however_small_its_share() -> None:
    student, teacher, _ = logits(3)
    student[:, 2] = -torch.inf
    loss, gradient = graded(LKHybrid(eta=1e6), student, teacher)
    assert loss.sum.item() == math.inf and gradient.isfinite().all()


finite = st.integers(-40, 40).map(lambda eighths: eighths / 8)
row = st.lists(finite, min_size=5, max_size=5)


@settings(max_examples=40, deadline=None)
@given(s=row, z=row)
def test_the_bounds_of_pinsker_and_bretagnolle_huber(s: list[float], z: list[float]) -> None:
    student, teacher = (torch.tensor([x], dtype=torch.float64) for x in (s, z))
    kl, variation, nla = (o.on_logits(student, teacher).sum.item() for o in (ForwardKL(), TotalVariation(), NegLogAcceptance()))
    assert variation <= math.sqrt(max(kl, 0.0) / 2) + 1e-9
    assert nla <= kl + math.log(2.0) + 1e-9  # TV <= 1 - e^-KL / 2
    assert -1e-12 <= variation <= nla + 1e-12


@pytest.mark.parametrize("k", [1, 3, 9])
def test_on_a_top_k_the_logged_rates_are_lower_bounds_and_the_loss_takes_the_upper_one(k: int) -> None:
    student, teacher, _ = logits(5, vocab=9)
    signal = top(teacher, k)
    found = row_metrics(DenseView(student), signal.view(slice(None)))
    exact = alphas(student, teacher)
    for i, (s, z) in enumerate(zip(student.tolist(), teacher.tolist(), strict=True)):
        p, q = oracle.softmax(z), oracle.softmax(s)
        ids = oracle.best(p, k)
        inside, [drafted] = sum(min(p[v], q[v]) for v in ids), oracle.best(q, 1)
        assert found["acceptance"][i].item() == pytest.approx(inside)
        assert found["acceptance_greedy"][i].item() == pytest.approx(p[drafted] if drafted in ids else 0.0)
        outside = min(1 - sum(p[v] for v in ids), 1 - sum(q[v] for v in ids))
        upper = math.exp(-_loss_of(student[i : i + 1], signal, i))
        assert upper == pytest.approx(inside + outside)
        assert inside - 1e-12 <= exact[i] <= upper + 1e-12
        assert k < 9 or upper == pytest.approx(inside)


def _loss_of(student: Tensor, signal: TeacherSignal, i: int) -> float:
    assert signal.support is Support.TOPK
    value = NegLogAcceptance().row(DenseView(student), signal.view(slice(i, i + 1)), torch.zeros(1, dtype=torch.long))
    return value.item()

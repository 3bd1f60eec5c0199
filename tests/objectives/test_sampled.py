"""Reverse KL from one drawn token: its mean over all tokens is the exact divergence, in value and in gradient."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdlib.kernels import linear_objective
from kdlib.kernels.metrics import row_metrics
from kdlib.objectives import ReverseKL, SampledReverseKL
from kdlib.types import DenseView, Head, Loss, Positions, StudentSignal, Support, TeacherSignal
from tests.objectives.cases import logits

V = 7


def run(
    objective: SampledReverseKL | ReverseKL,
    student: Tensor,
    teacher: TeacherSignal,
    labels: Tensor,
    drawn: Tensor | None,
    *,
    impl: str = "chunked",
) -> tuple[Loss, Tensor]:
    """Loss and gradient with respect to the student's logits [n, V], through an identity head."""
    hidden = student.detach().clone().requires_grad_()
    head = Head(weight=torch.eye(student.shape[-1], dtype=student.dtype))
    positions = Positions(index=torch.arange(len(labels)), labels=labels, sequence=torch.zeros_like(labels), drawn=drawn)
    signal = StudentSignal(hidden=hidden, head=head, positions=positions)
    loss = linear_objective(signal, teacher, objective, impl=impl, metrics=True)  # type: ignore[arg-type]
    return loss, torch.autograd.grad(loss.sum, hidden)[0]


def every_label(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row of logits [V] once for each label it could have drawn."""
    return student.expand(V, V), teacher.expand(V, V), torch.arange(V)


def of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, labels[:, None])


def exact(student: Tensor, teacher: Tensor) -> tuple[float, Tensor]:
    """KL(q || p) of one row of logits and its gradient, by autograd on the definition."""
    z = student.detach().clone().requires_grad_()
    logq, logp = z.log_softmax(-1), teacher.log_softmax(-1)
    kl = (logq.exp() * (logq - logp)).sum()
    return kl.item(), torch.autograd.grad(kl, z)[0]


def sampled_signal(teacher: Tensor, labels: Tensor) -> TeacherSignal:
    return TeacherSignal(logp=of_labels(teacher, labels), ids=labels[:, None], support=Support.SAMPLED_STUDENT)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("full", [True, False])
def test_the_mean_over_draws_is_the_exact_divergence(estimator: str, full: bool) -> None:
    objective = SampledReverseKL(estimator=estimator)  # type: ignore[arg-type]
    students, teachers, _ = logits(3)
    for one, other in zip(students, teachers, strict=True):
        student, teacher, labels = every_label(one, other)
        drawn = of_labels(student, labels)[:, 0]
        value, gradient = 0.0, torch.zeros(V, dtype=torch.float64)
        for y in range(V):  # each row alone, so that rows are weighted by the probability of drawing them
            row = slice(y, y + 1)
            signal = TeacherSignal(logits=teacher[row]) if full else sampled_signal(teacher[row], labels[row])
            loss, of_row = run(objective, student[row], signal, labels[row], drawn[row])
            value += drawn[y].exp().item() * loss.sum.item()
            gradient += drawn[y].exp() * of_row[0]
        kl, wanted = exact(one, other)
        assert value == pytest.approx(kl, abs=1e-12)
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


def test_labels_drawn_from_another_distribution_are_reweighted() -> None:
    students, teachers, _ = logits(1)
    student, teacher, labels = every_label(students[0], teachers[0])
    older = logits(1, seed=8, scale=0.7)[0].expand(V, V)  # an older student, or this one at another temperature
    drawn = of_labels(older, labels)[:, 0]
    value, gradient = 0.0, torch.zeros(V, dtype=torch.float64)
    for y in range(V):
        row = slice(y, y + 1)
        objective = SampledReverseKL(importance_clip=None)
        loss, of_row = run(objective, student[row], sampled_signal(teacher[row], labels[row]), labels[row], drawn[row])
        value += drawn[y].exp().item() * loss.sum.item()
        gradient += drawn[y].exp() * of_row[0]
    kl, wanted = exact(students[0], teachers[0])
    assert value == pytest.approx(kl, abs=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clip", [1.0, 2.0, None])
def test_a_row_is_its_formula(clip: float | None) -> None:
    student, teacher, labels = logits(5)
    logq, logp = of_labels(student, labels)[:, 0], of_labels(teacher, labels)[:, 0]
    drawn = logq + torch.tensor([-3.0, -0.1, 0.0, 0.2, 4.0])
    loss, gradient = run(SampledReverseKL(importance_clip=clip), student, sampled_signal(teacher, labels), labels, drawn)
    wanted, of_wanted = 0.0, []
    for i, y in enumerate(labels.tolist()):
        w = min(math.exp(logq[i].item() - drawn[i].item()), math.inf if clip is None else clip)
        gap = logq[i].item() - logp[i].item()
        q = student[i].softmax(-1).tolist()
        wanted += w * gap
        of_wanted.append([w * gap * ((v == y) - q[v]) for v in range(V)])
    assert loss.sum.item() == pytest.approx(wanted)
    torch.testing.assert_close(gradient, torch.tensor(of_wanted, dtype=torch.float64))


def test_labels_that_were_not_drawn_teach_nothing_and_count() -> None:
    student, teacher, labels = logits(6)
    drawn = of_labels(student, labels)[:, 0]
    partly = torch.where(torch.arange(6) % 2 == 0, drawn, torch.nan)
    loss, gradient = run(SampledReverseKL(), student, sampled_signal(teacher, labels), labels, partly)
    kept, of_kept = run(SampledReverseKL(), student[::2], sampled_signal(teacher[::2], labels[::2]), labels[::2], drawn[::2])
    assert loss.count == 6 and loss.sum.item() == pytest.approx(kept.sum.item())
    assert (gradient[1::2] == 0).all()
    torch.testing.assert_close(gradient[::2], of_kept)
    none, of_none = run(SampledReverseKL(), student, sampled_signal(teacher, labels), labels, None)
    assert none.sum.item() == 0.0 and (of_none == 0).all()


def test_chunked_is_the_reference_however_long() -> None:
    student, teacher, labels = logits(600)
    drawn = of_labels(student, labels)[:, 0] - 0.3 * torch.rand(600, dtype=torch.float64)
    drawn[::7] = torch.nan
    pair = [
        run(SampledReverseKL(), student, sampled_signal(teacher, labels), labels, drawn, impl=i)
        for i in ("chunked", "reference")
    ]
    assert pair[0][0].sum.item() == pytest.approx(pair[1][0].sum.item(), rel=1e-12)
    torch.testing.assert_close(pair[0][1], pair[1][1])


def test_a_label_that_the_teacher_rules_out_is_infinite_with_a_finite_gradient_that_pushes_it_down() -> None:
    student, teacher, labels = logits(2)
    teacher[0, labels[0]] = -torch.inf
    for estimator in ("k1", "k3"):
        objective = SampledReverseKL(estimator=estimator)  # type: ignore[arg-type]
        loss, gradient = run(objective, student, TeacherSignal(logits=teacher), labels, of_labels(student, labels)[:, 0])
        assert loss.sum.item() == math.inf and gradient.isfinite().all() and gradient[0, labels[0]] > 0


def test_it_agrees_with_reverse_kl_on_fresh_samples() -> None:
    student, teacher, labels = logits(6)
    signal, drawn = sampled_signal(teacher, labels), of_labels(student, labels)[:, 0]
    (one, of_one), (other, of_other) = (run(o, student, signal, labels, drawn) for o in (SampledReverseKL(), ReverseKL()))
    assert one.sum.item() == pytest.approx(other.sum.item())
    torch.testing.assert_close(of_one, of_other)


def test_metrics_are_both_estimates_over_the_drawn_rows() -> None:
    student, teacher, labels = logits(5)
    gap = of_labels(student, labels)[:, 0] - of_labels(teacher, labels)[:, 0]
    drawn = torch.tensor([0.0, torch.nan, -1.0, -2.0, torch.nan], dtype=torch.float64)
    loss, _ = run(SampledReverseKL(), student, sampled_signal(teacher, labels), labels, drawn)
    kept = gap[[0, 2, 3]].tolist()
    k3 = [math.exp(-g) - 1 + g for g in kept]
    for name, wanted in (("kl_k1", sum(kept)), ("kl_reverse", sum(kept)), ("kl_k3", sum(k3))):
        total, count = loss.metrics[name]
        assert (total.item(), count) == (pytest.approx(wanted), 3)
    whole = row_metrics(DenseView(student), sampled_signal(teacher, labels).view(slice(None)))
    torch.testing.assert_close(whole["kl_k1"], gap)  # a student's side that says nothing about draws


def test_on_logits_takes_labels_as_drawn_from_them() -> None:
    student, teacher, labels = logits(4)
    found = SampledReverseKL().on_logits(student, teacher, labels=labels)
    gap = of_labels(student, labels) - of_labels(teacher, labels)
    assert found.sum.item() == pytest.approx(gap.sum().item())
    with pytest.raises(ValueError, match="SampledReverseKL needs labels"):
        SampledReverseKL().on_logits(student, teacher)


@pytest.mark.parametrize("support", [Support.TOPK, Support.SAMPLED_TEACHER])
def test_signals_without_the_label_are_refused(support: Support) -> None:
    student, teacher, labels = logits(3)
    signal = TeacherSignal(logp=of_labels(teacher, labels), ids=labels[:, None], support=support)
    with pytest.raises(ValueError, match=r"SampledReverseKL accepts .*SAMPLED_STUDENT.*FULL"):
        run(SampledReverseKL(), student, signal, labels, None)

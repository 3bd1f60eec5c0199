"""``row_values`` against the rows from whole logits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kdlib.kernels import linear_objective, row_values
from kdlib.objectives import CrossEntropy, ForwardKL, RowObjective
from kdlib.types import DenseView, Support, TeacherSignal
from tests.kernels.test_linear_objective import MIXED, TwoSums, dense, problem


@pytest.mark.parametrize("objective", [ForwardKL(), ForwardKL(temperature=2.0), MIXED, TwoSums()], ids=str)
@pytest.mark.parametrize("n", [1, 256, 600])
def test_rows_are_those_of_whole_logits_without_weights(objective: RowObjective, n: int) -> None:
    at = problem(n, weighted=True, lora=True, bias=True, softcap=4.0)
    student = at.student({name: x.requires_grad_() for name, x in at.leaves.items()})
    found = row_values(student, at.teacher, objective)
    wanted = objective.row(DenseView(student.head(student.hidden)), DenseView(dense(at)), at.labels)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-11, atol=1e-11)
    assert not found.requires_grad
    summed = linear_objective(replace(student, positions=replace(student.positions, weight=None)), at.teacher, objective).sum
    torch.testing.assert_close(found.sum(0), summed.detach())


def test_a_top_k_teacher_a_padded_one_and_none() -> None:
    at = problem(300, teacher_vocab=14)
    student, labels = at.student(at.leaves), at.labels
    logits = student.head(student.hidden)
    found = row_values(student, at.teacher, ForwardKL())
    torch.testing.assert_close(found, ForwardKL().row(DenseView(logits), DenseView(dense(at)[:, :11]), labels))
    torch.testing.assert_close(row_values(student, None, CrossEntropy()), -logits.log_softmax(-1)[torch.arange(300), labels])
    logp, ids = dense(at)[:, :11].log_softmax(-1).topk(4)
    top = TeacherSignal(logp=logp, ids=ids, support=Support.TOPK)
    found = row_values(student, top, ForwardKL())
    torch.testing.assert_close(found, ForwardKL().row(DenseView(logits), top.view(slice(None)), labels))


def test_16_bit_hidden_states_under_autocast_give_float32() -> None:
    at = problem(40, dtype=torch.bfloat16)
    student = at.student(at.leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = row_values(student, at.teacher, ForwardKL())
    assert found.dtype == torch.float32
    wide = replace(student, hidden=student.hidden.float(), head=replace(student.head, weight=student.head.weight.float()))
    torch.testing.assert_close(found, row_values(wide, at.teacher, ForwardKL()))


def test_no_rows_and_signals_that_do_not_fit() -> None:
    at = problem(0)
    assert row_values(at.student(at.leaves), at.teacher, ForwardKL()).shape == (0,)
    at = problem(5)
    with pytest.raises(ValueError, match="ForwardKL needs a teacher"):
        row_values(at.student(at.leaves), None, ForwardKL())
    with pytest.raises(ValueError, match="speaks of 7 rows, the student of 5"):
        row_values(at.student(at.leaves), problem(7).teacher, ForwardKL())

"""Log-likelihoods of rows and chunks against logits that are all there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdlib.objectives.cross import likelihoods
from kdlib.objectives.cross.likelihoods import (
    chunk_sums,
    first_rows,
    last_rows,
    next_rows,
    student_likelihoods,
    student_likelihoods_and_mass,
    teacher_likelihoods,
    teacher_likelihoods_and_mass,
)
from kdlib.types import Positions, Support, TeacherSignal
from tests.objectives.cross_cases import LENGTH, CrossCase, cross_case, dense


def plain(logp: Tensor, labels: Tensor, tokens: Tensor) -> Tensor:
    """(log-prob of the label, log of the tokens' mass) of each row, one by one."""
    rows = zip(logp, labels.tolist(), strict=True)
    return torch.stack([torch.stack([row[label], row.exp()[tokens].sum().log()]) for row, label in rows])


def values(case: CrossCase) -> tuple[Tensor, Tensor]:
    assert case.tables.spaces is not None
    logq, logp = case.logp()
    return (
        plain(logq, case.positions.labels, case.tables.spaces[0]),
        plain(logp, case.other.labels, case.tables.spaces[1]),
    )


@pytest.mark.parametrize("rows", [2, 256])
def test_rows_of_both_sides(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihoods, "TEACHER_ROWS", rows)
    case = cross_case()
    student, teacher = values(case)
    torch.testing.assert_close(student_likelihoods(case.student), student[:, 0])
    torch.testing.assert_close(student_likelihoods_and_mass(case.student, case.tables.spaces[0]), student)
    for signal in (case.teacher, dense(case).teacher):
        torch.testing.assert_close(teacher_likelihoods(signal, case.other.labels), teacher[:, 0])
        torch.testing.assert_close(teacher_likelihoods_and_mass(signal, case.other.labels, case.tables.spaces[1]), teacher)


def test_gradients_of_both_columns() -> None:
    case = cross_case((((2, 1), (1, 1)),))
    found = student_likelihoods_and_mass(case.student, case.tables.spaces[0])
    upstream = torch.tensor([[0.5, -1.0], [2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    tensors = (case.student.hidden, case.student.head.weight)
    gradients = torch.autograd.grad((found * upstream).sum(), tensors)
    expected = torch.autograd.grad((values(case)[0] * upstream).sum(), tensors)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_log_probs_that_a_server_gave() -> None:
    case = cross_case()
    given = case.given()
    torch.testing.assert_close(teacher_likelihoods(given, case.other.labels), values(case)[1][:, 0])
    stored = TeacherSignal(logp=given.logp.half(), ids=given.ids, support=Support.SAMPLED_STUDENT)
    assert teacher_likelihoods(stored, case.other.labels).dtype == torch.float32
    with pytest.raises(ValueError, match="not those of the tokens in the row"):
        teacher_likelihoods(given, (case.other.labels + 1) % 13)
    two = TeacherSignal(logp=given.logp.repeat(1, 2), ids=given.ids.repeat(1, 2), support=Support.SAMPLED_STUDENT)
    with pytest.raises(ValueError, match="not those of the tokens in the row"):
        teacher_likelihoods(two, case.other.labels)


def test_no_gradient_goes_to_the_teacher() -> None:
    case = cross_case()
    hidden = case.teacher.hidden.clone().requires_grad_()
    signal = TeacherSignal(hidden=hidden, head=case.teacher.head)
    assert not teacher_likelihoods(signal, case.other.labels).requires_grad
    assert not teacher_likelihoods_and_mass(signal, case.other.labels, case.tables.spaces[1]).requires_grad


def test_no_row() -> None:
    case = cross_case(((),))
    spaces = case.tables.spaces
    for found, shape in (
        (student_likelihoods(case.student), (0,)),
        (student_likelihoods_and_mass(case.student, spaces[0]), (0, 2)),
    ):
        assert found.shape == shape
        (gradient,) = torch.autograd.grad(found.sum(), case.student.hidden)  # DDP waits for every parameter's gradient
        assert gradient.shape == (0, 5)
    assert teacher_likelihoods(case.teacher, case.other.labels).shape == (0,)
    assert teacher_likelihoods_and_mass(case.teacher, case.other.labels, spaces[1]).shape == (0, 2)


def test_rows_of_chunks() -> None:
    chunk = torch.tensor([-1, 0, 0, 1, -1, -1, 2, 2, 2, -1])
    rows = torch.arange(10.0)
    assert chunk_sums(rows, chunk, 3).tolist() == [3.0, 3.0, 21.0]
    assert first_rows(chunk, 3).tolist() == [1, 3, 6]
    assert last_rows(chunk, 3).tolist() == [2, 3, 8]
    for of_none in (torch.tensor([-1, -1]), torch.tensor([], dtype=torch.long)):
        found = chunk_sums(torch.ones(len(of_none)), of_none, 0), first_rows(of_none, 0), last_rows(of_none, 0)
        assert [len(one) for one in found] == [0, 0, 0]


def test_gradients_of_chunk_sums() -> None:
    chunk = torch.tensor([0, -1, 1, 1])
    rows = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: chunk_sums(x, chunk, 2), rows)


def test_the_row_after_a_chunk() -> None:
    """Of the same sequence and at the next position, in a chunk or in none."""
    positions = Positions(
        index=torch.tensor([0, 1, 2, 4, 5, 6, LENGTH, LENGTH + 1]),
        sequence=torch.tensor([0, 0, 0, 0, 0, 1, 2, 2]),
        labels=torch.zeros(8, dtype=torch.long),
        chunk=torch.tensor([0, 0, 1, 2, -1, 3, 4, 5]),
        chunks=6,
    )
    rows, there = next_rows(positions)
    # then another chunk, a gap, a token of no chunk, another sequence at once, another chunk, the end
    assert there.tolist() == [True, False, True, False, True, False]
    assert rows[there].tolist() == [2, 4, 7]
    empty = torch.tensor([], dtype=torch.long)
    rows, there = next_rows(Positions(index=empty, labels=empty, sequence=empty, chunk=empty))
    assert (len(rows), len(there)) == (0, 0)

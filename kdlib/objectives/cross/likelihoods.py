"""Log-likelihoods of given tokens under both models, and of the chunks that they make up."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdlib.head import accumulation_dtype
from kdlib.kernels import linear_rows
from kdlib.types import DenseView, Positions, StudentSignal, Support, TeacherSignal, View

TEACHER_ROWS = 256  # whose logits are made at a time

LogProbsOf = Callable[[View], Tensor]  # the distributions [n, V] of a view, such as those at a temperature
FromLogProbs = Callable[[Tensor, Tensor], Tensor]  # (log-probs [n, V], labels [n]) -> [n] or [n, J]


def as_they_are(view: View) -> Tensor:
    """Log-probs [n, V] at temperature 1."""
    return view.at(1.0).logp


def student_likelihoods(student: StudentSignal, log_probs: LogProbsOf = as_they_are) -> Tensor:
    """log q(label) [N] of every row, with gradients; no [N, V]."""
    if not len(student.positions):
        return _no_rows(student)
    return _student_rows(student, _of_labels, log_probs)


def student_likelihoods_and_mass(student: StudentSignal, tokens: Tensor) -> Tensor:
    """log q(label) and log sum_v q(v) over the ``tokens`` [V] (bool) of every row [N, 2], with gradients; no [N, V]."""
    if not len(student.positions):
        return _no_rows(student)[:, None].expand(0, 2)
    return _student_rows(student, _with_mass(tokens))


@torch.no_grad()
def teacher_likelihoods(teacher: TeacherSignal, labels: Tensor, log_probs: LogProbsOf = as_they_are) -> Tensor:
    """log p(label) [N'] of every row; of sampled signals the log-probs of the labels, which they hold.

    Raises ValueError for sampled signals of other tokens, or of another temperature.
    """
    if teacher.support is Support.SAMPLED_STUDENT:
        assert teacher.logp is not None and teacher.ids is not None
        if teacher.temperature != 1.0:
            raise ValueError(f"the teacher's log-probs are at temperature {teacher.temperature}: likelihoods need them at 1")
        if teacher.ids.shape[-1] != 1 or not torch.equal(teacher.ids[:, 0], labels):
            raise ValueError("the teacher's log-probs are not those of the tokens in the row")
        return teacher.logp[:, 0].float() if teacher.logp.dtype.itemsize < 4 else teacher.logp[:, 0]
    found = _teacher_rows(teacher, labels, _of_labels, log_probs)
    return torch.cat(found) if found else torch.zeros(0, device=labels.device)


@torch.no_grad()
def teacher_likelihoods_and_mass(teacher: TeacherSignal, labels: Tensor, tokens: Tensor) -> Tensor:
    """log p(label) and log sum_v p(v) over the ``tokens`` [V'] (bool) of every row [N', 2], of a full signal."""
    found = _teacher_rows(teacher, labels, _with_mass(tokens))
    return torch.cat(found) if found else torch.zeros(0, 2, device=labels.device)


def chunk_sums(rows: Tensor, chunk: Tensor, chunks: int) -> Tensor:
    """[C]: the sum of the ``rows`` [N] of each chunk; those of none (-1) are left out."""
    sums = rows.new_zeros(chunks + 1)
    return sums.index_add(0, chunk.where(chunk >= 0, chunks), rows)[:chunks]


def first_rows(chunk: Tensor, chunks: int) -> Tensor:
    """[C]: the first row of each chunk, whose rows follow one another."""
    places = torch.arange(len(chunk), device=chunk.device)
    first = places.new_full((chunks + 1,), len(chunk))
    return first.scatter_reduce(0, chunk.where(chunk >= 0, chunks), places, "amin")[:chunks]


def last_rows(chunk: Tensor, chunks: int) -> Tensor:
    """[C]: the last row of each chunk."""
    places = torch.arange(len(chunk), device=chunk.device)
    last = places.new_full((chunks + 1,), -1)
    return last.scatter_reduce(0, chunk.where(chunk >= 0, chunks), places, "amax")[:chunks]


def next_rows(positions: Positions) -> tuple[Tensor, Tensor]:
    """The row that follows the last one of each chunk [C], and whether it is there [C]: scored, and of the same sequence.

    Its hidden state is the one at the chunk's last token, and its distribution is over what comes after the chunk.
    """
    assert positions.chunk is not None
    last = last_rows(positions.chunk, positions.chunks)
    following = (last + 1).clamp(max=len(positions) - 1)
    index, sequence = positions.index, positions.sequence
    return following, (index[following] == index[last] + 1) & (sequence[following] == sequence[last])


def _of_labels(logp: Tensor, labels: Tensor) -> Tensor:
    return logp.gather(-1, labels[:, None])[:, 0]


def _with_mass(tokens: Tensor) -> FromLogProbs:
    """Of a row the log-prob of its label and of ``tokens`` together; a mask, because to list them would wait for the device."""

    def values(logp: Tensor, labels: Tensor) -> Tensor:
        mass = logp.masked_fill(~tokens, -torch.inf).logsumexp(-1)
        return torch.stack([_of_labels(logp, labels), mass], -1)

    return values


def _student_rows(student: StudentSignal, values: FromLogProbs, log_probs: LogProbsOf = as_they_are) -> Tensor:
    labels = student.positions.labels

    def row(q: DenseView, rows: slice) -> Tensor:
        return values(log_probs(q), labels[rows])

    return linear_rows(student, row)


def _teacher_rows(
    teacher: TeacherSignal, labels: Tensor, values: FromLogProbs, log_probs: LogProbsOf = as_they_are
) -> list[Tensor]:
    return [values(log_probs(teacher.view(rows)), labels[rows]) for rows in slices(len(labels))]


def slices(total: int) -> list[slice]:
    """Of 0..total-1, so many rows at a time as a teacher's logits are made of."""
    return [slice(start, min(start + TEACHER_ROWS, total)) for start in range(0, total, TEACHER_ROWS)]


def _no_rows(student: StudentSignal) -> Tensor:
    """[0], part of the graph of the hidden states, so that a loss of it can be differentiated."""
    return student.hidden.sum(-1).to(accumulation_dtype(student.hidden, student.head.weight))

"""Log-likelihoods of given tokens under both models, and of the chunks that they make up."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlib.kernels import linear_rows
from kdlib.types import DenseView, StudentSignal, Support, TeacherSignal

TEACHER_ROWS = 256  # whose logits are made at a time


def student_likelihoods(student: StudentSignal) -> Tensor:
    """log q(label) [N] of every row at temperature 1, with gradients; no [N, V]."""
    labels = student.positions.labels
    if not len(labels):
        return student.hidden.new_zeros(0)

    def row(q: DenseView, rows: slice) -> Tensor:
        return q.at(1.0).logp.gather(-1, labels[rows, None])[:, 0]

    return linear_rows(student, row)


@torch.no_grad()
def teacher_likelihoods(teacher: TeacherSignal, labels: Tensor) -> Tensor:
    """log p(label) [N'] of every row at temperature 1; of sampled signals the log-probs of the labels, which they hold.

    Raises ValueError for sampled signals of other tokens.
    """
    if teacher.support is Support.SAMPLED_STUDENT:
        assert teacher.logp is not None and teacher.ids is not None
        if teacher.ids.shape[-1] != 1 or not torch.equal(teacher.ids[:, 0], labels):
            raise ValueError("the teacher's log-probs are not those of the tokens in the row")
        return teacher.logp[:, 0].float() if teacher.logp.dtype.itemsize < 4 else teacher.logp[:, 0]
    found = [
        teacher.at(slice(start, start + TEACHER_ROWS), 1.0).logp.gather(-1, labels[start : start + TEACHER_ROWS, None])[:, 0]
        for start in range(0, len(labels), TEACHER_ROWS)
    ]
    return torch.cat(found) if found else torch.zeros(0, device=labels.device)


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

"""Where two tokenisations are compared, and what a chunk of several tokens is there: the chain rule, as one distribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kdlib.kernels import linear_rows
from kdlib.objectives.cross.likelihoods import LogProbsOf, chunk_sums, first_rows, student_likelihoods, teacher_likelihoods
from kdlib.objectives.cross.rows import positional_pairs, rows_of_student
from kdlib.types import DenseView, Positions, StudentSignal, TeacherSignal

Alignment = Literal["chunks", "positional"]
LEAST = -1e30  # log of likelihood zero: differences of -inf are NaN


@dataclass(frozen=True, kw_only=True)
class Start:
    """One model where n chunks begin: ``logp`` [n, V] of the next token, ``first`` [n] the token that stands there, ``later``
    [n] log-prob of the chunk's other tokens given it; None where no chunk has more than one token.

    The text goes on with the chunk, with its first token and otherwise after it, or with another token. So the first token's
    mass P(x0) is split into that of the chunk, P(x0) P(x1 | x0) ..., and the rest of it: V + 1 outcomes, whose sum is one.
    """

    logp: Tensor
    first: Tensor
    later: Tensor | None

    @property
    def log_chunk(self) -> Tensor:
        """log-prob [n] of the whole chunk."""
        found = self.logp.gather(-1, self.first[:, None])[:, 0]
        return found if self.later is None else found + self.later

    @property
    def log_otherwise(self) -> Tensor:
        """log-prob [n] of the first token with anything but the chunk's after it; -inf where the chunk is one token."""
        if self.later is None:
            return torch.full_like(self.logp[:, 0], -torch.inf)
        some = self.later < 0.0
        otherwise = torch.log(-torch.expm1(torch.where(some, self.later, -1.0)))
        return torch.where(some, self.logp.gather(-1, self.first[:, None])[:, 0] + otherwise, -torch.inf)

    def probabilities(self) -> Tensor:
        """Of the V + 1 outcomes [n, V + 1]: in the first token's place the chunk, last the first token with another end.

        [n, V] where every chunk is one token.
        """
        p = self.logp.exp()
        if self.later is None:
            return p
        whole = p.gather(-1, self.first[:, None])
        chunk, otherwise = whole * self.later.exp()[:, None], whole * -torch.expm1(self.later)[:, None]
        return torch.cat([p.scatter(-1, self.first[:, None], chunk), otherwise], -1)


Compare = Callable[[Start, Start], Tensor]  # student's and teacher's, n chunks each -> [n]


@dataclass(frozen=True, kw_only=True)
class Places:
    """The C places where student and teacher are compared: both at these rows, and what ``Start`` asks for beside [C].

    ``later`` has gradients, ``teacher_later`` has none.
    """

    student: StudentSignal
    teacher: TeacherSignal
    first: Tensor
    teacher_first: Tensor
    later: Tensor | None = None
    teacher_later: Tensor | None = None

    def __len__(self) -> int:
        return len(self.first)

    def student_start(self, logp: Tensor, rows: slice, *, later: Tensor | None = None) -> Start:
        """The student at some places, where its distributions are ``logp``; ``later`` instead of its own, without gradient."""
        own = None if self.later is None else self.later[rows].detach()
        return Start(logp=logp, first=self.first[rows], later=own if later is None else later)

    @torch.no_grad()
    def teacher_start(self, rows: slice, log_probs: LogProbsOf) -> Start:
        """The teacher at some places."""
        later = None if self.teacher_later is None else self.teacher_later[rows]
        return Start(logp=log_probs(self.teacher.view(rows)), first=self.teacher_first[rows], later=later)


def places_of(student: StudentSignal, teacher: TeacherSignal, *, alignment: Alignment, log_probs: LogProbsOf) -> Places:
    """One place for each chunk, at the rows of both sides that predict its first token; or one for each pair of rows."""
    positions, other = student.positions, student.positions.other
    assert other is not None and len(teacher) == len(other)
    if alignment == "positional":
        mine, theirs = positional_pairs(positions)
    else:
        assert positions.chunk is not None and other.chunk is not None
        mine, theirs = (first_rows(side.chunk, positions.chunks) for side in (positions, other) if side.chunk is not None)
    places = Places(
        student=rows_of_student(student, mine),
        teacher=teacher.kept(theirs),
        first=positions.labels[mine],
        teacher_first=other.labels[theirs],
    )
    if alignment == "positional" or not len(places):
        return places
    chunks = positions.chunks
    one, other_one = len(positions) == chunks, len(other) == chunks  # every chunk has one row
    return replace(
        places,
        later=None if one else _later(student_likelihoods(student, log_probs), positions, mine, chunks),
        teacher_later=None
        if other_one
        else _later(teacher_likelihoods(teacher, other.labels, log_probs), other, theirs, chunks),
    )


def total_places(positions: Positions, alignment: Alignment) -> int:
    """How many places ``places_of`` finds."""
    return positions.chunks if alignment == "chunks" else len(positional_pairs(positions)[0])


def compared(places: Places, compare: Compare, *, log_probs: LogProbsOf) -> Tensor:
    """``compare`` at every place [C], with gradients to the student at the chunks' first and later tokens.

    The derivative to a place's later tokens is that to one number, their log-prob: it is taken in forward, of each place.
    """
    assert len(places)
    row, again = (partial(way, places, compare, log_probs) for way in (_with_slope, _again))
    found = linear_rows(places.student, row, again=again)
    if places.later is None:
        return found
    value, slope = found.unbind(-1)
    return value + slope.detach() * (places.later - places.later.detach())


def _with_slope(places: Places, compare: Compare, log_probs: LogProbsOf, q: DenseView, rows: slice) -> Tensor:
    """[n], or [n, 2] with the derivative to ``later``; no gradient."""
    teacher, logp = places.teacher_start(rows, log_probs), log_probs(q).detach()
    if places.later is None:
        return compare(places.student_start(logp, rows), teacher)
    later = places.later[rows].detach().requires_grad_()
    value = compare(places.student_start(logp, rows, later=later), teacher)
    return torch.stack([value.detach(), torch.autograd.grad(value.sum(), later)[0]], -1)


def _again(places: Places, compare: Compare, log_probs: LogProbsOf, q: DenseView, rows: slice) -> Tensor:
    """The same with the gradient to the distributions at the first tokens."""
    value = compare(places.student_start(log_probs(q), rows), places.teacher_start(rows, log_probs))
    return value if places.later is None else torch.stack([value, torch.zeros_like(value)], -1)


def _later(labels: Tensor, positions: Positions, first: Tensor, chunks: int) -> Tensor:
    """[C]: the sum of the labels' log-probs [N] of each chunk, but not of its first token."""
    assert positions.chunk is not None
    return chunk_sums(labels.clamp(min=LEAST, max=0.0).index_fill(0, first, 0.0), positions.chunk, chunks)

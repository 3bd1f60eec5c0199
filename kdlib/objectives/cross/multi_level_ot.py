"""MultiLevelOT (AAAI 2025, arXiv 2412.14528): ranks that hold for a whole sequence, and transport between its rows."""

# Annotations are evaluated here (no future import): see objectives/base.py.

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from kdlib.kernels import linear_rows
from kdlib.kernels.outcomes import kl, log_total
from kdlib.kernels.sinkhorn import sinkhorn
from kdlib.objectives.cross.base import CrossTokenizerObjective, Tables
from kdlib.objectives.cross.likelihoods import slices
from kdlib.objectives.cross.merged import Places, Start, places_of, total_places
from kdlib.objectives.cross.rows import sum_of_no_rows, teacher_of
from kdlib.objectives.sinkhorn.costs import costs
from kdlib.types import DenseView, Loss, Positions, StudentSignal, TeacherSignal, View

SMALLEST_SPREAD = 1e-4  # added to the standard deviation of a row's logits, as in the paper's code


@dataclass(frozen=True, kw_only=True)
class MultiLevelOT(CrossTokenizerObjective):
    """Sum over places of sum_i |q_i - p_i| + 0.1 KL(p || q) + 0.1 <P, C>, i over the k largest columns of each side.

    Each row's logits are divided by their standard deviation over the vocabulary (plus 0.0001) in the place of a temperature.
    A column is a token, ranked by its probability summed over the places of its sequence, in q and p by itself: so the i-th
    column is one token in all rows of a sequence, as it is not in ``ULD``. KL is over these columns and the mass outside of
    them; P is Sinkhorn's plan between the student's and the teacher's rows of a sequence, each of the same mass, and C the L1
    distance between rows over the columns; <P, C>, for rows of mass one in all, counts once for each place.

    A place is a chunk or a pair of rows, and chunks of several tokens are merged, as in ``ULD``: in the column of the first
    token stands the probability of the whole chunk, and what else begins with that token is outside of the columns.

    Where the paper's code departs from its formulas these are followed: the code takes the softmax of probabilities again
    before KL and Sinkhorn, calls its KL with teacher and student exchanged, ranks columns over a micro-batch, and gives the
    plan mass n and the weight 0.001. Ranks within a sequence make the loss independent of what else is in the micro-batch.

    Options beside those of all objectives between two tokenizers:

    alignment: chunks, or positional (see ``ULD``).
    top_k: how many columns are compared; of a smaller vocabulary all but one.
    ranked_kl, transport: weights of the second and third term beside the first; 0 leaves one out.
    epsilon, iterations: of Sinkhorn, epsilon in units of C.

    The default ``weight`` is that of the paper's code. Raises ValueError for options out of range.
    """

    weight: float = 1.5
    alignment: Literal["chunks", "positional"] = "chunks"
    top_k: int = 50
    ranked_kl: float = 0.1
    transport: float = 0.1
    epsilon: float = 0.1
    iterations: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment not in ("chunks", "positional"):
            raise ValueError(f"MultiLevelOT.alignment is chunks or positional, not {self.alignment!r}")
        for name, low in (("top_k", 1), ("iterations", 1), ("ranked_kl", 0), ("transport", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"MultiLevelOT.{name} must be at least {low}, not {getattr(self, name)}")
        if not self.epsilon > 0:
            raise ValueError(f"MultiLevelOT.epsilon must be above 0, not {self.epsilon}")

    def total(self, positions: Positions) -> int:
        return total_places(positions, self.alignment)

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None, tables: Tables | None = None) -> Loss:
        teacher = teacher_of(self, teacher)
        places = places_of(student, teacher, alignment=self.alignment, log_probs=standardised)
        if not len(places):
            return Loss(sum=sum_of_no_rows(student), count=0)
        assert teacher.vocab_size is not None
        with torch.autocast(student.hidden.device.type, enabled=False):  # which would round distances to 16 bits
            k = min(self.top_k, student.head.out_features - 1, teacher.vocab_size - 1)  # outside of them there is always mass
            _, group, sizes = torch.unique_consecutive(
                places.student.positions.sequence, return_inverse=True, return_counts=True
            )
            q, p = _student_columns(places, group, len(sizes), k), _teacher_columns(places, group, len(sizes), k)
            return Loss(sum=self._distance(q, p.to(q.dtype), sizes.tolist()), count=len(places))

    def _distance(self, q: Tensor, p: Tensor, sizes: list[int]) -> Tensor:
        """From log-probabilities [C, k + 1] of the columns and outside of them, of sequences of ``sizes`` places each."""
        x, y = q[:, :-1].exp(), p[:, :-1].exp()
        total = (x - y).abs().sum()
        if self.ranked_kl:
            total = total + self.ranked_kl * kl(p, q).sum()
        if self.transport:
            moved = [self._moved(a, b) for a, b in zip(x.split(sizes), y.split(sizes), strict=True)]
            total = total + self.transport * torch.stack(moved).sum()
        return total

    def _moved(self, x: Tensor, y: Tensor) -> Tensor:
        """n <P, C> between the rows x and y [n, k] of one sequence."""
        mass = x.new_full((len(x),), -math.log(len(x)))
        cost = costs(x, y, "l1")
        found = sinkhorn(cost, mass, mass, epsilon=self.epsilon, iterations=self.iterations, loss="transport")
        return len(x) * found.value


def standardised(view: View) -> Tensor:
    """log softmax of z / (std_V(z) + 0.0001) [n, V], the standard deviation over the tokens whose logit is not -inf."""
    assert isinstance(view, DenseView)
    possible = view.logits > -torch.inf
    z = torch.where(possible, view.logits, 0.0)
    number = possible.sum(-1, keepdim=True)
    apart = torch.where(possible, z - z.sum(-1, keepdim=True) / number, 0.0)
    variance = apart.square().sum(-1, keepdim=True) / (number - 1)
    spread = variance.clamp(min=torch.finfo(z.dtype).tiny).sqrt() + SMALLEST_SPREAD
    return (z / spread).masked_fill(~possible, -torch.inf).log_softmax(-1)


def _student_columns(places: Places, group: Tensor, groups: int, k: int) -> Tensor:
    """log q [C, k + 1] of the k largest columns of each place's sequence, and of all else."""
    student = places.student

    def start(rows: slice) -> Start:
        return places.student_start(standardised(DenseView(student.head(student.hidden[rows]))), rows)

    columns = _largest(start, group, groups, k)

    def row(q: DenseView, rows: slice) -> Tensor:
        return _parts(places.student_start(standardised(q), rows), columns[group[rows]])

    parts = linear_rows(student, row)
    return _joined(parts, columns[group], places.first, places.later)


@torch.no_grad()
def _teacher_columns(places: Places, group: Tensor, groups: int, k: int) -> Tensor:
    """The same of the teacher."""
    start = partial(places.teacher_start, log_probs=standardised)
    columns = _largest(start, group, groups, k)
    parts = torch.cat([_parts(start(rows), columns[group[rows]]) for rows in slices(len(group))])
    return _joined(parts, columns[group], places.teacher_first, places.teacher_later)


@torch.no_grad()
def _largest(start: Callable[[slice], Start], group: Tensor, groups: int, k: int) -> Tensor:
    """ids [groups, k] of the tokens with the largest mass in all places of a group, from the largest."""
    mass: Tensor | None = None
    for rows in slices(len(group)):
        here = start(rows)
        p = here.probabilities()[:, : here.logp.shape[1]]
        mass = p.new_zeros(groups, p.shape[1]) if mass is None else mass
        mass.index_add_(0, group[rows], p)
    assert mass is not None
    return mass.topk(k, dim=-1).indices


def _parts(start: Start, columns: Tensor) -> Tensor:
    """log-masses [n, k + 2] of the next token: the ``columns`` [n, k], the first token of the chunk, and any other."""
    first = start.first[:, None]
    others = start.logp.scatter(-1, columns, -torch.inf).scatter(-1, first, -torch.inf)
    return torch.cat([start.logp.gather(-1, columns), start.logp.gather(-1, first), log_total(others)[:, None]], -1)


def _joined(parts: Tensor, columns: Tensor, first: Tensor, later: Tensor | None) -> Tensor:
    """log-masses [n, k + 1] of the columns and of all else, from ``_parts``: the chunk takes the place of its first token."""
    named, others = parts[:, :-2], parts[:, -1]
    split = Start(logp=parts, first=torch.full_like(first, parts.shape[1] - 2), later=later)
    here = columns == first[:, None]
    chunk = split.log_chunk
    outside = torch.stack([others, split.log_otherwise, torch.where(here.any(-1), -torch.inf, chunk)], -1)
    return torch.cat([torch.where(here, chunk[:, None], named), log_total(outside)[:, None]], -1)

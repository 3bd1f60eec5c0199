"""Dual-space distillation (DSKD, arXiv 2406.17328, 2504.11426): each model's states are read by the other's head."""

# Annotations are evaluated here (no future import): see objectives/base.py.

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from kdlib.kernels import linear_objective
from kdlib.objectives.base import RowObjective
from kdlib.objectives.cross.alm import DIVERGENCES
from kdlib.objectives.cross.base import CrossTokenizerObjective, Tables, tables_of
from kdlib.objectives.cross.likelihoods import chunk_sums, first_rows
from kdlib.objectives.cross.rows import rows_of_student, teacher_of
from kdlib.objectives.cross_entropy import CrossEntropy
from kdlib.objectives.kl import ForwardKL
from kdlib.types import Loss, Positions, StudentSignal, Support, TeacherSignal, View


@dataclass(frozen=True, kw_only=True)
class DualSpace(CrossTokenizerObjective):
    """CE(t, y) + 1[argmax t = y] D(t, q) over the student's rows + KL(p || s) over the teacher's rows.

    t is what the student's head W_s reads in the teacher's states, s what the teacher's head W_t reads in the student's, so
    that distributions are compared within one vocabulary: t = softmax(A V_t W_s'), s = softmax(B V_s W_t'). A [n, m] and
    B [m, n] are the attention between a sequence's rows, softmax(Q K' / sqrt(2 D')) and softmax(K Q' / sqrt(2 D')):

        Q = query([E_s(x); E_s(y)])   K = unit([E_t(x); E_t(y)])   V_t = t2s(unit(h_t) + unit(E_t(y)))   V_s = s2t(h_s)

    where x is the token read at a row, y its label, E the input embeddings, h the last hidden states; query, t2s and s2t are
    linear layers that are trained. With ``alignment="chunks"`` rows are paired where a chunk is one token on both sides, and
    t2s(unit(h_t)) and s2t(h_s) take the places of the attention's results; other rows are left out.

    Both heads, all embeddings and the t of the second term are held fixed; CE trains query and t2s alone. unit(x) is x divided
    by the standard deviation of its own features; DSKD's is that of the whole batch, on which the loss would depend.

    The sum over a sequence's m teacher rows is taken times n / m, n its student rows, so that sum / count is the mean over the
    student's rows of all three terms, however a step is split into micro-batches. Count: the student's rows,
    with ``alignment="chunks"`` the pairs. DSKD's loss is half the cross-entropy plus half of this one.

    Options beside those of all objectives between two tokenizers:

    alignment: attention between the rows of a sequence, or chunks.
    divergence: D of the second term: kl is KL(t || student), or reverse_kl, jsd, total_variation.
    temperature: of the two divergences; divides the logits of both sides.

    Raises ValueError for options out of range and for a teacher without hidden states and head.
    """

    alignment: Literal["attention", "chunks"] = "attention"
    divergence: Literal["kl", "reverse_kl", "jsd", "total_variation"] = "kl"
    temperature: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment not in ("attention", "chunks"):
            raise ValueError(f"DualSpace.alignment is attention or chunks, not {self.alignment!r}")
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"DualSpace.divergence is one of {', '.join(DIVERGENCES)}, not {self.divergence!r}")
        if not self.temperature > 0:
            raise ValueError(f"DualSpace.temperature must be above 0, not {self.temperature}")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("embeddings", "modules") if self.alignment == "attention" else ("modules",)

    def total(self, positions: Positions) -> int:
        return len(positions) if self.alignment == "attention" else len(one_to_one(positions)[0])

    def build_modules(self, *, student_width: int, teacher_width: int, seed: int) -> nn.Module | None:
        """The linear layers, drawn as torch's own are, from ``seed`` alone."""
        generator = torch.Generator().manual_seed(seed)
        widths = {"t2s": (teacher_width, student_width), "s2t": (student_width, teacher_width)}
        if self.alignment == "attention":
            widths["query"] = (2 * student_width, 2 * teacher_width)
        return nn.ModuleDict({name: _linear(*width, generator) for name, width in widths.items()})

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None, tables: Tables | None = None) -> Loss:
        teacher, found = teacher_of(self, teacher), tables_of(self, tables)
        if teacher.hidden is None:
            raise ValueError(
                "DualSpace reads the teacher's hidden states: use a teacher that runs here, or one served with hidden states"
            )
        with torch.autocast(student.hidden.device.type, enabled=False):  # which would round attention to 16 bits
            crossed = _attended(student, teacher, found) if self.alignment == "attention" else _paired(student, teacher, found)
        return self._compared(student, teacher, crossed)

    def _compared(self, student: StudentSignal, teacher: TeacherSignal, crossed: "Crossed") -> Loss:
        """The three terms."""
        assert teacher.head is not None and student.positions.other is not None
        own, head = rows_of_student(student, crossed.rows), student.head.detached()
        in_student = crossed.in_student.to(student.hidden.dtype)
        label = linear_objective(replace(own, hidden=in_student, head=head), None, CrossEntropy())
        agreeing = Agreeing(divergence=self.divergence, temperature=self.temperature)
        t2s = linear_objective(own, TeacherSignal(hidden=in_student.detach(), head=head), agreeing)
        other, rows = student.positions.other, crossed.other_rows
        positions = Positions(index=other.index[rows], labels=other.labels[rows], sequence=other.sequence[rows])
        there = StudentSignal(
            hidden=crossed.in_teacher.to(teacher.hidden.dtype),  # type: ignore[union-attr]
            head=teacher.head.detached(),
            positions=replace(positions, weight=crossed.weight),
        )
        s2t = linear_objective(there, teacher.kept(rows), ForwardKL(temperature=self.temperature))
        count = self.total(student.positions)
        parts = {"dual_t2s_cross_entropy": label, "dual_t2s": t2s, "dual_s2t": s2t}
        metrics = {name: (part.sum.detach(), count) for name, part in parts.items()}
        return Loss(sum=label.sum + t2s.sum + s2t.sum, count=count, metrics=metrics)


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """States in the other model's space: ``in_student`` [n, D] for its ``rows`` [n], ``in_teacher`` [m, D'] for its
    ``other_rows`` [m], which count by ``weight`` [m].
    """

    in_student: Tensor
    rows: Tensor
    in_teacher: Tensor
    other_rows: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Agreeing(RowObjective):
    """D(t, q) of the rows whose label is the likeliest token of t, the view in the teacher's place; 0 of others."""

    accepts = Support.FULL

    divergence: str = "kl"

    @property
    def reads_labels(self) -> bool:
        return True

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        assert p is not None
        logp = p.at(self.temperature).logp
        values = DIVERGENCES[self.divergence].between(logp, q.at(self.temperature).logp)
        return values.where(logp.argmax(-1) == labels, 0.0)


def one_to_one(positions: Positions) -> tuple[Tensor, Tensor]:
    """([M], [M]): rows of student and teacher whose chunk is one token on both sides."""
    assert positions.chunk is not None and positions.other is not None and positions.other.chunk is not None
    sides = (positions.chunk, positions.other.chunk)
    single = [chunk_sums(torch.ones_like(side), side, positions.chunks) == 1 for side in sides]
    mine, theirs = (first_rows(side, positions.chunks)[single[0] & single[1]] for side in sides)
    return mine, theirs


def _paired(student: StudentSignal, teacher: TeacherSignal, tables: Tables) -> Crossed:
    modules = tables.modules
    assert isinstance(modules, nn.ModuleDict) and teacher.hidden is not None
    mine, theirs = one_to_one(student.positions)
    dtype = next(modules.parameters()).dtype
    return Crossed(
        in_student=modules["t2s"](_unit(teacher.hidden[theirs].to(dtype))),
        rows=mine,
        in_teacher=modules["s2t"](student.hidden[mine].to(dtype)),
        other_rows=theirs,
    )


def _attended(student: StudentSignal, teacher: TeacherSignal, tables: Tables) -> Crossed:
    """Attention between the rows of each sequence; a sequence with rows on one side alone is left out."""
    positions, modules = student.positions, tables.modules
    other = positions.other
    assert isinstance(modules, nn.ModuleDict) and tables.embeddings is not None
    assert other is not None and teacher.hidden is not None
    dtype = next(modules.parameters()).dtype
    x_s, y_s = _embedded(tables.embeddings[0], positions, dtype)
    x_t, y_t = _embedded(tables.embeddings[1], other, dtype)
    query, key = modules["query"](torch.cat([x_s, y_s], -1)), _unit(torch.cat([x_t, y_t], -1))
    of_teacher = modules["t2s"](_unit(teacher.hidden.detach().to(dtype)) + _unit(y_t))
    of_student = modules["s2t"](student.hidden.to(dtype))
    found = []
    for mine, theirs in _same_sequence(positions.sequence, other.sequence):
        scores = query[mine] @ key[theirs].T / key.shape[-1] ** 0.5
        weight = scores.new_full((len(theirs),), len(mine) / len(theirs))
        found.append((scores.softmax(-1) @ of_teacher[theirs], mine, scores.T.softmax(-1) @ of_student[mine], theirs, weight))
    none = positions.index[:0]
    nothing = (of_teacher[:0], none, of_student[:0], none, of_teacher.new_zeros(0))
    in_student, rows, in_teacher, other_rows, weights = map(torch.cat, zip(nothing, *found, strict=True))
    return Crossed(in_student=in_student, rows=rows, in_teacher=in_teacher, other_rows=other_rows, weight=weights)


def _same_sequence(sequence: Tensor, other: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The student's rows and the teacher's of each sequence that has both."""
    both = set(sequence.unique().tolist()) & set(other.unique().tolist())
    return [tuple((side == number).nonzero()[:, 0] for side in (sequence, other)) for number in sorted(both)]


def _embedded(table: Tensor, positions: Positions, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The embeddings [N, D] of the tokens that are read and of the labels, without gradient."""
    assert positions.tokens is not None, "the trainer sets the tokens that are read"
    return table.detach()[positions.tokens].to(dtype), table.detach()[positions.labels].to(dtype)


def _unit(x: Tensor) -> Tensor:
    """x [N, D] divided by the standard deviation of each row; rows of zeros stay what they are."""
    variance = (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)
    return x / variance.sqrt().clamp(min=torch.finfo(x.dtype).eps)


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, dtype=torch.float32)  # draws nothing from the global generator
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer

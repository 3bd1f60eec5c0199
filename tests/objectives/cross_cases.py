"""Small random signals of a student and a teacher that read one text in different tokens.

A layout says how: for each sequence its parts from left to right, ``(m, n)`` a chunk of m student and n teacher tokens,
``(-m, -n)`` tokens that belong to no chunk, and None a token of each side that is not scored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdlib.head import Head
from kdlib.objectives.cross import Tables
from kdlib.types import Positions, StudentSignal, Support, TeacherSignal

Layout = Sequence[Sequence[tuple[int, int] | None]]
LENGTH = 64  # positions of a sequence in the flattened batch

LAYOUT: Layout = (
    ((2, 1), (1, 1), (1, 3), (-1, -2), (1, 2), (2, 2)),
    ((1, 1), None, (3, 1), (1, 1), (1, 1)),
    ((2, 3),),
)


@dataclass(frozen=True, kw_only=True)
class CrossCase:
    """Signals of both models, the teacher's hidden or dense, and what is known of their vocabularies."""

    student: StudentSignal
    teacher: TeacherSignal
    tables: Tables

    @property
    def positions(self) -> Positions:
        return self.student.positions

    @property
    def other(self) -> Positions:
        assert self.positions.other is not None
        return self.positions.other

    def logp(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities [N, V] and [N', V'] of student and teacher, by plain autograd."""
        logits = self.teacher.logits if self.teacher.head is None else self.teacher.head(self.teacher.hidden)
        return self.student.head(self.student.hidden).log_softmax(-1), logits.log_softmax(-1)

    def given(self) -> TeacherSignal:
        """What a server says of the teacher's tokens: their log-probs alone."""
        labels = self.other.labels[:, None]
        return TeacherSignal(logp=self.logp()[1].gather(-1, labels), ids=labels, support=Support.SAMPLED_STUDENT)


def cross_case(
    layout: Layout = LAYOUT,
    *,
    seed: int = 0,
    vocab: tuple[int, int] = (11, 13),
    width: tuple[int, int] = (5, 6),
    scale: float = 1.5,
    dtype: torch.dtype = torch.float64,
) -> CrossCase:
    """Random hidden states and heads; the student's hidden states and head want gradients. The teacher is ``hidden + head``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    sides = [positions(layout, side=side, vocab=vocab[side], generator=generator) for side in (0, 1)]
    hidden = [normal(len(side), w) for side, w in zip(sides, width, strict=True)]
    weights = [scale * normal(v, w) / w**0.5 for v, w in zip(vocab, width, strict=True)]
    shared = [torch.randperm(v, generator=generator)[: min(vocab) // 2] for v in vocab]
    spaces = [torch.rand(v, generator=generator) < 0.4 for v in vocab]
    for side in spaces:
        side[0] = True
    return CrossCase(
        student=StudentSignal(
            hidden=hidden[0].requires_grad_(),
            head=Head(weight=weights[0].requires_grad_()),
            positions=replace(sides[0], other=sides[1]),
        ),
        teacher=TeacherSignal(hidden=hidden[1], head=Head(weight=weights[1])),
        tables=Tables(shared=(shared[0], shared[1]), spaces=(spaces[0], spaces[1])),
    )


def positions(layout: Layout, *, side: int, vocab: int, generator: torch.Generator) -> Positions:
    """The scored positions of one side, 0 the student's and 1 the teacher's, with random labels; ``other`` is not set."""
    rows: list[tuple[int, int, int]] = []  # index, sequence, chunk
    chunks = 0
    for sequence, parts in enumerate(layout):
        at = sequence * LENGTH
        for part in parts:
            if part is None:
                at += 1
                continue
            count = abs(part[side])
            chunk = chunks if part[side] > 0 else -1
            rows += [(at + i, sequence, chunk) for i in range(count)]
            at, chunks = at + count, chunks + (part[side] > 0)
    index, sequences, chunk_of = torch.tensor(rows, dtype=torch.long).view(-1, 3).unbind(-1)
    labels = torch.randint(0, vocab, (len(rows),), generator=generator)
    return Positions(index=index, labels=labels, sequence=sequences, chunk=chunk_of, chunks=chunks)


def dense(case: CrossCase) -> CrossCase:
    """The same with the teacher's logits in the place of its hidden states."""
    assert case.teacher.head is not None and case.teacher.hidden is not None
    return replace(case, teacher=TeacherSignal(logits=case.teacher.head(case.teacher.hidden)))


def of_sequences(case: CrossCase, keep: Sequence[int]) -> CrossCase:
    """The case of some sequences alone, as a micro-batch has them; hidden states and head stay those tensors."""
    sides, kept = [], []
    for side in (case.positions, case.other):
        assert side.chunk is not None
        of = torch.isin(side.sequence, torch.tensor(keep))
        chunk = side.chunk[of]
        names = chunk[chunk >= 0].unique()
        numbers = torch.searchsorted(names, chunk).where(chunk >= 0, -1) if len(names) else chunk
        whole = {name: getattr(side, name)[of] for name in ("index", "labels", "sequence")}
        sides.append(Positions(**whole, chunk=numbers, chunks=len(names)))
        kept.append(of)
    student = replace(case.student, hidden=case.student.hidden[kept[0]], positions=replace(sides[0], other=sides[1]))
    return replace(case, student=student, teacher=case.teacher.kept(kept[1]))


def random_layout(seed: int, *, sequences: int = 4) -> Layout:
    """Up to six parts for each sequence, most of them chunks."""
    draw = random.Random(seed)

    def part() -> tuple[int, int] | None:
        m, n = draw.randint(1, 3), draw.randint(1, 3)
        return draw.choices([(m, n), (-m, -n), None], weights=[8, 1, 1])[0]

    return [[part() for _ in range(draw.randint(0, 6))] for _ in range(sequences)]


def check_gradients(value: Callable[..., Tensor], *tensors: Tensor, step: float = 1e-6) -> list[Tensor]:
    """The gradients of ``value(*tensors)``, once they are found to be its central differences.

    In the place of gradcheck, which differentiates a graph several times, as ``linear_rows`` cannot be.
    """
    found = torch.autograd.grad(value(*tensors), tensors)
    with torch.no_grad():
        for place, gradient in enumerate(found):
            varied = [tensor.clone() for tensor in tensors]
            flat = varied[place].view(-1)
            for i, of_entry in enumerate(gradient.flatten().tolist()):
                entry = float(flat[i])
                around = []
                for moved in (entry + step, entry - step):
                    flat[i] = moved
                    around.append(float(value(*varied)))
                flat[i] = entry
                numeric = (around[0] - around[1]) / (2 * step)
                assert abs(numeric - of_entry) < 1e-6 * (1 + abs(numeric)), (place, i, numeric, of_entry)
    return list(found)

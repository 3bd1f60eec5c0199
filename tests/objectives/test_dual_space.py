"""Dual-space distillation against the same written with dense matrices, a sequence at a time."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdlib.head import Head
from kdlib.objectives.cross import Tables
from kdlib.objectives.cross.dual_space import DualSpace, one_to_one
from kdlib.types import Positions, StudentSignal, TeacherSignal
from tests.objectives.cross_cases import (
    LAYOUT,
    LENGTH,
    CrossCase,
    Layout,
    check_gradients,
    cross_case,
    dense,
    of_sequences,
    random_layout,
)

VOCAB, WIDTH = (4, 5), (5, 6)  # few tokens, so that some rows agree with their labels


def case(objective: DualSpace, layout: Layout = LAYOUT, *, seed: int = 0) -> CrossCase:
    """With the tokens that are read, random embeddings, and projections in float64."""
    made = cross_case(layout, seed=seed, vocab=VOCAB, width=WIDTH)
    generator = torch.Generator().manual_seed(seed)
    embeddings = [torch.randn(v, w, generator=generator, dtype=torch.float64) for v, w in zip(VOCAB, WIDTH, strict=True)]
    modules = objective.build_modules(student_width=WIDTH[0], teacher_width=WIDTH[1], seed=seed)
    assert modules is not None
    return read(replace(made, tables=Tables(embeddings=(embeddings[0], embeddings[1]), modules=modules.double())))


def read(made: CrossCase) -> CrossCase:
    """The tokens that are read at each position, the same in every micro-batch."""
    generator = torch.Generator().manual_seed(5)
    sides = []
    for side, vocab in zip((made.positions, made.other), VOCAB, strict=True):
        tokens = torch.randint(0, vocab, (32 * LENGTH,), generator=generator)
        sides.append(replace(side, tokens=tokens[side.index]))
    return replace(made, student=replace(made.student, positions=replace(sides[0], other=sides[1])))


def leaves(made: CrossCase) -> list[Tensor]:
    assert made.tables.modules is not None
    return [made.student.hidden, made.student.head.weight, *made.tables.modules.parameters()]


def value(objective: DualSpace, made: CrossCase) -> Tensor:
    return objective(made.student, made.teacher, made.tables).sum


# the oracle


def expected(objective: DualSpace, made: CrossCase) -> tuple[Tensor, int]:
    """The sum of the three terms by plain autograd, and how many rows agree."""
    total, agreed = torch.zeros((), dtype=torch.float64), 0
    for number in sorted(set(made.positions.sequence.tolist()) & set(made.other.sequence.tolist())):
        mine, theirs = ((side.sequence == number).nonzero()[:, 0] for side in (made.positions, made.other))
        if objective.alignment == "chunks":
            mine, theirs = pairs(made, number)
        in_student, in_teacher = crossed(objective, made, mine, theirs)
        share = len(mine) / max(len(theirs), 1)
        found, count = terms(objective, made, mine=mine, theirs=theirs, in_student=in_student, in_teacher=in_teacher)
        total = total + found[0] + found[1] + share * found[2]
        agreed += count
    return total, agreed


def pairs(made: CrossCase, number: int) -> tuple[Tensor, Tensor]:
    """Rows of the chunks of a sequence that are one token on both sides."""
    found: list[tuple[int, int]] = []
    sides = [(side.chunk.tolist(), side.sequence.tolist()) for side in (made.positions, made.other)]
    for chunk in range(made.positions.chunks):
        rows = [[i for i, c in enumerate(chunks) if c == chunk] for chunks, _ in sides]
        if len(rows[0]) == len(rows[1]) == 1 and sides[0][1][rows[0][0]] == number:
            found.append((rows[0][0], rows[1][0]))
    return torch.tensor([i for i, _ in found], dtype=torch.long), torch.tensor([j for _, j in found], dtype=torch.long)


def unit(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return x / centred.square().mean(-1, keepdim=True).sqrt()


def crossed(objective: DualSpace, made: CrossCase, mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    modules, hidden = made.tables.modules, made.teacher.hidden
    assert modules is not None and hidden is not None
    weight = {
        name: (modules.get_submodule(name).weight, modules.get_submodule(name).bias) for name in dict(modules.named_children())
    }
    states = made.student.hidden[mine] @ weight["s2t"][0].T + weight["s2t"][1]
    if objective.alignment == "chunks":
        return unit(hidden[theirs]) @ weight["t2s"][0].T + weight["t2s"][1], states
    assert made.tables.embeddings is not None
    E, F = made.tables.embeddings
    s = torch.cat([E[made.positions.tokens[mine]], E[made.positions.labels[mine]]], 1)
    t = torch.cat([F[made.other.tokens[theirs]], F[made.other.labels[theirs]]], 1)
    scores = (s @ weight["query"][0].T + weight["query"][1]) @ unit(t).T / math.sqrt(2 * WIDTH[1])
    of_teacher = (unit(hidden[theirs]) + unit(F[made.other.labels[theirs]])) @ weight["t2s"][0].T + weight["t2s"][1]
    A, B = (z.exp() / z.exp().sum(1, keepdim=True) for z in (scores, scores.T))
    return A @ of_teacher, B @ states


def terms(
    objective: DualSpace, made: CrossCase, *, mine: Tensor, theirs: Tensor, in_student: Tensor, in_teacher: Tensor
) -> tuple[list[Tensor], int]:
    T, labels = objective.temperature, made.positions.labels[mine]
    assert made.teacher.hidden is not None and made.teacher.head is not None
    W, head = made.student.head.weight.detach(), made.teacher.head.weight
    t = in_student @ W.T
    label = -t.log_softmax(-1)[torch.arange(len(mine)), labels].sum()
    agrees = t.argmax(-1) == labels
    student = made.student.hidden[mine] @ made.student.head.weight.T
    t2s = (agrees * kl(t.detach() / T, student / T, reverse=objective.divergence == "reverse_kl")).sum()
    s2t = kl(made.teacher.hidden[theirs] @ head.T / T, in_teacher @ head.T / T).sum()
    return [label, t2s, s2t], int(agrees.sum())


def kl(p: Tensor, q: Tensor, *, reverse: bool = False) -> Tensor:
    """KL(p || q) [n] from logits."""
    a, b = (q, p) if reverse else (p, q)
    return (a.softmax(-1) * (a.log_softmax(-1) - b.log_softmax(-1))).sum(-1)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "divergence": "reverse_kl"},
    {"alignment": "chunks"},
    {"alignment": "chunks", "temperature": 0.7, "divergence": "reverse_kl"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_dense_matrices(options: dict[str, Any]) -> None:
    objective = DualSpace(**options)
    made = case(objective)
    found, (wanted, agreed) = objective(made.student, made.teacher, made.tables), expected(objective, made)
    assert agreed > 0
    torch.testing.assert_close(found.sum, wanted, rtol=1e-9, atol=1e-9)
    assert found.count == objective.total(made.positions)
    torch.testing.assert_close(sum(total for total, _ in found.metrics.values()), found.sum.detach())
    for ours, theirs in zip(
        torch.autograd.grad(found.sum, leaves(made)), torch.autograd.grad(wanted, leaves(made)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("alignment", ["attention", "chunks"])
def test_gradients_are_central_differences(alignment: Any) -> None:
    """Of what no term holds fixed: the student's states, and the projection into the teacher's space."""
    objective = DualSpace(alignment=alignment)
    made = case(objective)
    modules = made.tables.modules
    assert modules is not None
    projection = modules.get_submodule("s2t")

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        swapped = nn.ModuleDict({**dict(modules.named_children()), "s2t": Projection(weight, projection.bias)})
        tables = replace(made.tables, modules=swapped)
        return objective(replace(made.student, hidden=hidden), made.teacher, tables).sum

    check_gradients(loss, made.student.hidden, projection.weight)


class Projection(nn.Module):
    """A linear layer with the tensors given."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.made = (weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, *self.made)


# what is held fixed, and what does not matter


def test_rows_that_do_not_agree_leave_the_students_head_alone() -> None:
    """Without a projection all tokens are alike, and the first is taken for the likeliest: it is no row's label."""
    objective = DualSpace()
    made = case(objective)
    assert made.tables.modules is not None
    for parameter in made.tables.modules.get_submodule("t2s").parameters():
        nn.init.zeros_(parameter)
    for label, agrees in ((3, False), (0, True)):
        positions = replace(made.positions, labels=torch.full_like(made.positions.labels, label))
        found = objective(replace(made.student, positions=positions), made.teacher, made.tables)
        assert (found.metrics["dual_t2s"][0] > 0) == agrees
        assert bool(torch.autograd.grad(found.sum, made.student.head.weight)[0].any()) == agrees


def test_heads_and_embeddings_of_the_teacher_get_no_gradient() -> None:
    objective = DualSpace()
    made = case(objective)
    assert made.tables.embeddings is not None and made.teacher.hidden is not None and made.teacher.head is not None
    for tensor in (*made.tables.embeddings, made.teacher.hidden, made.teacher.head.weight):
        tensor.requires_grad_()
    value(objective, made).backward()
    assert all(x.grad is None for x in (*made.tables.embeddings, made.teacher.hidden, made.teacher.head.weight))
    assert all(x.grad is not None and x.grad.any() for x in leaves(made))


@pytest.mark.parametrize("alignment", ["attention", "chunks"])
@pytest.mark.parametrize("seed", range(3))
def test_micro_batches(seed: int, alignment: Any) -> None:
    """The sum over micro-batches is that of the batch: no row looks at another sequence, nor does a statistic."""
    objective = DualSpace(alignment=alignment)
    made = case(objective, layout=(*random_layout(seed, sequences=3), ((1, 2), (1, 1))), seed=seed)
    whole = objective(made.student, made.teacher, made.tables)
    found = []
    for keep in ([0, 2], [1], [3]):
        part = read(of_sequences(made, keep))
        found.append(objective(part.student, part.teacher, part.tables))
    assert sum(part.count for part in found) == whole.count > 0
    split = torch.stack([part.sum for part in found]).sum()
    torch.testing.assert_close(split, whole.sum)
    for ours, theirs in zip(
        torch.autograd.grad(split, leaves(made)), torch.autograd.grad(whole.sum, leaves(made)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_mean_over_the_students_rows() -> None:
    """A sequence whose teacher has twice as many rows counts as much as before."""
    objective = DualSpace()
    made = case(objective, layout=(((1, 1), (2, 1), (1, 2)),))
    twice = torch.arange(len(made.other)).repeat(2)
    other = made.other
    doubled = Positions(**{name: getattr(other, name)[twice] for name in ("index", "labels", "sequence", "tokens")})
    student = replace(made.student, positions=replace(made.positions, other=doubled))
    again = objective(student, made.teacher.kept(twice), made.tables)
    assert again.count == len(made.positions)
    torch.testing.assert_close(again.sum, value(objective, made))


def test_pairs_are_chunks_of_one_token_on_both_sides() -> None:
    objective = DualSpace(alignment="chunks")
    made = case(objective)
    mine, theirs = one_to_one(made.positions)
    assert objective.total(made.positions) == len(mine) == 4
    assert torch.equal(made.positions.chunk[mine], made.other.chunk[theirs])
    assert made.teacher.hidden is not None
    there = torch.isin(torch.arange(len(made.other)), theirs)
    noise = torch.randn_like(made.teacher.hidden).masked_fill(there[:, None], 0.0)
    noisy = replace(made.teacher, hidden=made.teacher.hidden + noise)
    assert torch.equal(objective(made.student, noisy, made.tables).sum, value(objective, made))
    (gradient,) = torch.autograd.grad(value(objective, made), made.student.hidden)
    assert gradient.abs().sum(-1).nonzero()[:, 0].tolist() == mine.tolist()


@pytest.mark.parametrize("alignment", ["attention", "chunks"])
def test_no_rows_in_common(alignment: Any) -> None:
    objective = DualSpace(alignment=alignment)
    made = case(objective, layout=(((2, 1),), ((1, 2),)))
    elsewhere = replace(made.other, sequence=made.other.sequence + 7)
    found = objective(replace(made.student, positions=replace(made.positions, other=elsewhere)), made.teacher, made.tables)
    assert found.sum.item() == 0.0 and found.count == (3 if alignment == "attention" else 0)
    found.sum.backward()
    assert all(x.grad is None or not x.grad.any() for x in leaves(made))


# training, types, errors


@pytest.mark.parametrize("alignment", ["attention", "chunks"])
def test_training_lowers_the_loss(alignment: Any) -> None:
    """A student that is the teacher: the projections learn, and the student stays near to what it was."""
    objective = DualSpace(alignment=alignment)
    made = case(objective, layout=(((1, 1),) * 12, ((1, 1),) * 8))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    head = Head(weight=2.0 * torch.randn(4, 6, generator=generator, dtype=torch.float64))
    labels = head(hidden).argmax(-1)
    side = replace(made.positions, labels=labels)
    trained = hidden.clone().requires_grad_()
    modules = objective.build_modules(student_width=6, teacher_width=6, seed=0)
    assert modules is not None
    modules = modules.double()
    table = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    tables = Tables(embeddings=(table, table), modules=modules)
    signal = StudentSignal(hidden=trained, head=head, positions=replace(side, other=side))
    optimizer = torch.optim.SGD([trained, *modules.parameters()], lr=0.01)
    values = []
    for _ in range(40):
        found = objective(signal, TeacherSignal(hidden=hidden, head=head), tables)
        optimizer.zero_grad()
        found.sum.backward()
        optimizer.step()
        values.append(found.sum.item())
    assert values[-1] < 0.5 * values[0]
    assert float((head(trained).argmax(-1) == labels).double().mean()) > 0.9


@pytest.mark.parametrize("alignment", ["attention", "chunks"])
def test_states_in_16_bits(alignment: Any) -> None:
    objective = DualSpace(alignment=alignment)
    made = case(objective)
    assert made.teacher.hidden is not None and made.teacher.head is not None and made.tables.modules is not None
    assert made.tables.embeddings is not None
    wanted = value(objective, made)
    half = torch.bfloat16
    student = replace(
        made.student,
        hidden=made.student.hidden.detach().to(half).requires_grad_(),
        head=Head(weight=made.student.head.weight.detach().to(half)),
    )
    teacher = TeacherSignal(hidden=made.teacher.hidden.to(half), head=Head(weight=made.teacher.head.weight.to(half)))
    tables = Tables(
        embeddings=(made.tables.embeddings[0].to(half), made.tables.embeddings[1].to(half)), modules=made.tables.modules.float()
    )
    with torch.autocast("cpu", dtype=half):
        found = objective(student, teacher, tables)
    assert found.sum.dtype == torch.float32
    torch.testing.assert_close(found.sum.double(), wanted, rtol=0.05, atol=0.5)
    found.sum.backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in tables.modules.parameters())


def test_modules_are_drawn_from_their_seed_alone() -> None:
    before = torch.get_rng_state()
    made, again, other = (DualSpace().build_modules(student_width=3, teacher_width=4, seed=s) for s in (1, 1, 2))
    assert made is not None and again is not None and other is not None
    assert torch.equal(torch.get_rng_state(), before)
    shapes = {name: tuple(x.shape) for name, x in made.state_dict().items() if name.endswith("weight")}
    assert shapes == {"t2s.weight": (3, 4), "s2t.weight": (4, 3), "query.weight": (8, 6)}
    first, second, third = (torch.cat([x.flatten() for x in m.parameters()]) for m in (made, again, other))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert all(x.abs().max() <= x.shape[-1] ** -0.5 for x in made.parameters() if x.ndim == 2)
    paired = DualSpace(alignment="chunks").build_modules(student_width=3, teacher_width=4, seed=1)
    assert paired is not None and sorted(dict(paired.named_children())) == ["s2t", "t2s"]


def test_refused() -> None:
    for options, message in (
        ({"alignment": "greedy"}, "attention or chunks"),
        ({"divergence": "l1"}, "kl, reverse_kl, total_variation, jsd"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"cross_entropy": -1.0}, "cross_entropy must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            DualSpace(**options)
    objective = DualSpace()
    made = case(objective)
    with pytest.raises(ValueError, match="hidden states: use a teacher that runs here"):
        objective(made.student, dense(made).teacher, made.tables)
    with pytest.raises(ValueError, match="the teacher gives"):
        objective(made.student, made.given(), made.tables)
    with pytest.raises(ValueError, match="needs embeddings of both sides"):
        objective(made.student, made.teacher, Tables(modules=made.tables.modules))
    with pytest.raises(ValueError, match="needs modules"):
        DualSpace(alignment="chunks")(made.student, made.teacher, Tables(embeddings=made.tables.embeddings))

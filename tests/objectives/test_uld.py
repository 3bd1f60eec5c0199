"""ULD by rank: chunks merged by the chain rule, positional as in the paper's code, gradients at all tokens of a chunk."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kdlib.head import Head
from kdlib.objectives.cross.merged import Start
from kdlib.objectives.cross.rows import positional_pairs
from kdlib.objectives.cross.uld import ULD, ranked_distance
from kdlib.types import Positions, StudentSignal, Support, TeacherSignal
from tests.objectives.cross_cases import CrossCase, cross_case, dense, of_sequences, random_layout

SINGLE = (((1, 1), (1, 1)), ((1, 1),))  # every row is a chunk


def logits(case: CrossCase) -> tuple[Tensor, Tensor]:
    return case.student.head(case.student.hidden), case.teacher.view(slice(None)).logits


def merged(z: Tensor, labels: list[int], *, temperature: float = 1.0) -> list[Tensor]:
    """All outcomes of a chunk with logits [m, V] of its tokens, one after the other."""
    rows = (z / temperature).softmax(-1)
    if len(labels) == 1:
        return list(rows[0])
    chunk = torch.stack([row[label] for row, label in zip(rows, labels, strict=True)]).prod()
    outcomes = [chunk if v == labels[0] else rows[0, v] for v in range(rows.shape[1])]
    return [*outcomes, rows[0, labels[0]] - chunk]


def by_rank(q: list[Tensor], p: list[Tensor], *, top: int = 0) -> Tensor:
    a, b = (sorted(x, key=Tensor.detach, reverse=True) for x in (q, p))
    pairs = list(itertools.zip_longest(a, b, fillvalue=torch.zeros((), dtype=torch.float64)))
    return torch.stack([(x - y).abs() for x, y in pairs[: top or None]]).sum()


def rows_of(side: Positions, chunk: int) -> tuple[list[int], list[int]]:
    rows = [i for i, c in enumerate(side.chunk.tolist()) if c == chunk]
    return rows, side.labels[rows].tolist()


def oracle(case: CrossCase, objective: ULD) -> Tensor:
    """The sum over chunks, a chunk and an outcome at a time, by plain autograd."""
    total = torch.zeros((), dtype=torch.float64)
    for chunk in range(case.positions.chunks):
        sides = []
        for z, side in zip(logits(case), (case.positions, case.other), strict=True):
            rows, labels = rows_of(side, chunk)
            sides.append(merged(z[rows], labels, temperature=objective.temperature))
        total = total + by_rank(*sides, top=objective.top_k)
    return total


def gradients(value: Tensor, case: CrossCase) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, [case.student.hidden, case.student.head.weight])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab", [(11, 13), (13, 11)])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"temperature": 2.0, "top_k": 4}])
def test_value_and_gradient(seed: int, vocab: tuple[int, int], options: dict[str, float]) -> None:
    objective = ULD(**options)
    layout = ((((2, 1), (1, 3), (-1, -2), (1, 2)), ((1, 1),), ((3, 2),)), *map(random_layout, range(3)))[seed]
    case = cross_case(layout, seed=seed, vocab=vocab)
    found, expected = objective(case.student, case.teacher), oracle(case, objective)
    assert found.count == objective.total(case.positions) == case.positions.chunks
    torch.testing.assert_close(found.sum, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(found.sum, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_later_tokens_get_a_gradient() -> None:
    case = cross_case((((3, 1),),), vocab=(3, 5), seed=1)
    (grad,) = torch.autograd.grad(ULD()(case.student, case.teacher).sum, case.student.hidden)
    assert (grad.abs().amax(-1) > 1e-3).all()


def central_differences(value: Callable[[StudentSignal], Tensor], student: StudentSignal) -> list[Tensor]:
    """d value / d hidden states and d value / d head; the kernel's graph can be used once, which gradcheck does not allow."""
    leaves = [student.hidden.detach(), student.head.weight.detach()]

    def moved(leaf: int, entry: int, step: float) -> Tensor:
        there = [x.clone() for x in leaves]
        there[leaf].view(-1)[entry] += step
        return value(replace(student, hidden=there[0], head=replace(student.head, weight=there[1]))).detach()

    return [
        torch.stack([(moved(i, j, 1e-6) - moved(i, j, -1e-6)) / 2e-6 for j in range(x.numel())]).view_as(x)
        for i, x in enumerate(leaves)
    ]


def test_gradients_are_those_of_the_value() -> None:
    case, objective = cross_case((((2, 1), (1, 2)), ((3, 2),)), vocab=(5, 4), width=(3, 3)), ULD(temperature=1.3)
    expected = central_differences(lambda student: objective(student, case.teacher).sum, case.student)
    for a, b in zip(gradients(objective(case.student, case.teacher).sum, case), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_the_merged_distribution_is_that_of_strings() -> None:
    """All strings of three tokens of a Markov model, gathered by how they begin."""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).log_softmax(-1)
    before, text = 2, (1, 3, 0)
    expected = torch.zeros(5, dtype=torch.float64)
    for string in itertools.product(range(4), repeat=3):
        probability = sum(table[a, b] for a, b in itertools.pairwise((before, *string))).exp()
        expected[4 if string[0] == text[0] and string != text else string[0]] += probability
    start = Start(logp=table[None, before], first=torch.tensor([1]), later=(table[1, 3] + table[3, 0])[None])
    torch.testing.assert_close(start.probabilities()[0], expected)
    torch.testing.assert_close(start.log_chunk.exp()[0], expected[1])
    torch.testing.assert_close(start.log_otherwise.exp()[0], expected[4])
    torch.testing.assert_close(start.probabilities().sum(), torch.tensor(1.0, dtype=torch.float64))


def test_a_chunk_whose_later_tokens_are_certain_or_impossible() -> None:
    logp = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log().expand(2, 2)
    start = Start(logp=logp, first=torch.tensor([1, 1]), later=torch.tensor([0.0, -1e30], dtype=torch.float64))
    assert start.probabilities().flatten().tolist() == pytest.approx([0.5, 0.5, 0.0, 0.5, 0.0, 0.5])
    assert start.log_otherwise.exp().tolist() == pytest.approx([0.0, 0.5])


def test_an_observed_token_that_the_student_rules_out() -> None:
    case = cross_case((((2, 1),),))
    bias = torch.zeros(11, dtype=torch.float64)
    bias[case.positions.labels[1]] = -torch.inf
    case = replace(case, student=replace(case.student, head=replace(case.student.head, bias=bias)))
    found = ULD()(case.student, case.teacher).sum
    assert found.isfinite() and all(grad.isfinite().all() for grad in gradients(found, case))
    torch.testing.assert_close(found, oracle(case, ULD()))


def same(case: CrossCase) -> CrossCase:
    """The student as its own teacher, which reads the same tokens."""
    other = replace(case.positions, other=None)
    student = replace(case.student, positions=replace(case.positions, other=other))
    return replace(case, student=student, teacher=TeacherSignal(logits=case.student.head(case.student.hidden).detach()))


@pytest.mark.parametrize("alignment", ["chunks", "positional"])
def test_zero_where_both_agree(alignment: str) -> None:
    case = same(cross_case())
    assert ULD(alignment=alignment)(case.student, case.teacher).sum < 1e-12


@pytest.mark.parametrize("alignment", ["chunks", "positional"])
@pytest.mark.parametrize("seed", range(5))
def test_a_place_is_at_most_two_apart(alignment: str, seed: int) -> None:
    case = cross_case(random_layout(seed), seed=seed, scale=20.0)
    found = ULD(alignment=alignment)(case.student, case.teacher)
    assert 0.0 < found.sum <= 2.0 * found.count


def test_the_names_of_tokens_do_not_matter() -> None:
    case = cross_case()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    other = replace(case.other, labels=order.argsort()[case.other.labels])
    renamed = replace(case.student, positions=replace(case.positions, other=other))
    teacher = TeacherSignal(logits=logits(case)[1][:, order])
    torch.testing.assert_close(ULD()(renamed, teacher).sum, ULD()(case.student, case.teacher).sum)


@pytest.mark.parametrize("alignment", ["chunks", "positional"])
def test_micro_batches_add_up(alignment: str) -> None:
    case, objective = cross_case(), ULD(alignment=alignment)
    parts = [of_sequences(case, keep) for keep in ([0, 2], [1])]
    losses = [objective(part.student, part.teacher) for part in parts]
    whole = objective(case.student, case.teacher)
    assert whole.count == sum(loss.count for loss in losses) == sum(objective.total(part.positions) for part in parts)
    total = losses[0].sum + losses[1].sum
    torch.testing.assert_close(total, whole.sum)
    for a, b in zip(gradients(total, case), gradients(whole.sum, case), strict=True):
        torch.testing.assert_close(a, b)


def test_rows_outside_of_chunks_and_storages_make_no_difference() -> None:
    case = cross_case(SINGLE)
    longer = cross_case((((1, 1), (1, 1), (-1, -1)), ((1, 1),)))
    keep = torch.tensor([0, 1, 3])
    hidden = longer.student.hidden.detach().index_copy(0, keep, case.student.hidden.detach())
    positions = [
        side.labels.index_copy(0, keep, short.labels)
        for side, short in ((longer.positions, case.positions), (longer.other, case.other))
    ]
    student = replace(
        longer.student,
        hidden=hidden,
        head=case.student.head,
        positions=replace(longer.positions, labels=positions[0], other=replace(longer.other, labels=positions[1])),
    )
    teacher = TeacherSignal(hidden=longer.teacher.hidden.index_copy(0, keep, case.teacher.hidden), head=case.teacher.head)
    expected = ULD()(case.student, case.teacher).sum
    torch.testing.assert_close(ULD()(student, teacher).sum, expected)
    torch.testing.assert_close(ULD()(case.student, dense(case).teacher).sum, expected)


def test_pairs_are_of_equal_rank_within_a_sequence() -> None:
    def side(*sequence: int) -> Positions:
        rows = torch.tensor(sequence)
        return Positions(index=rows, labels=rows, sequence=rows)

    positions = replace(side(0, 0, 0, 2, 3), other=side(0, 0, 1, 2, 2, 3))
    mine, theirs = positional_pairs(positions)
    assert mine.tolist() == [0, 1, 3, 4] and theirs.tolist() == [0, 1, 3, 5]
    mixed = replace(side(3, 0, 0), other=side(0, 3, 3, 0))
    assert sorted(zip(*(rows.tolist() for rows in positional_pairs(mixed)), strict=True)) == [(0, 1), (1, 0), (2, 3)]


@pytest.mark.parametrize("top_k", [0, 3])
def test_positional_is_the_code_of_the_paper(top_k: int) -> None:
    """mean over answers of the mean over their first min(n, m) tokens: ours is weighted by these lengths."""
    case, objective = cross_case(), ULD(alignment="positional", top_k=top_k, temperature=1.2)
    q, p = ((z / 1.2).softmax(-1) for z in logits(case))
    expected, count = torch.zeros((), dtype=torch.float64), 0
    for sequence in range(3):
        mine, theirs = (side.sequence == sequence for side in (case.positions, case.other))
        length = min(int(mine.sum()), int(theirs.sum()))
        count += length
        for a, b in zip(q[mine][:length], p[theirs][:length], strict=True):
            expected = expected + by_rank(list(a), list(b), top=top_k)
    found = objective(case.student, case.teacher)
    assert found.count == objective.total(case.positions) == count
    torch.testing.assert_close(found.sum, expected)
    for a, b in zip(gradients(found.sum, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(a, b)


def test_positional_is_trl_bayesian() -> None:
    gold = pytest.importorskip("trl.experimental.gold.gold_trainer")
    settings = SimpleNamespace(
        uld_crossentropy_weight=0.0,
        uld_distillation_weight=1.0,
        uld_student_temperature=1.0,
        uld_teacher_temperature=1.0,
        uld_skip_student_eos=False,
        uld_skip_teacher_eos=False,
        use_extended_uld=False,
        uld_token_merge_strategy="bayesian",
    )
    torch.manual_seed(0)
    q, p = torch.randn(1, 7, 9), torch.randn(1, 8, 12)
    ids = [torch.randint(0, 9, (1, 7)), torch.randint(0, 9, (1, 8))]
    labels = [torch.cat([torch.full((1, k), -100), x[:, k:]], 1) for x, k in zip(ids, (3, 2), strict=True)]
    theirs = gold.ULDLoss(settings)(q, p, *labels, *ids)

    def side(index: Tensor, tokens: Tensor) -> Positions:
        return Positions(index=index, labels=tokens[0, index + 1], sequence=torch.zeros_like(index))

    mine, other = side(torch.arange(2, 6), ids[0]), side(torch.arange(1, 7), ids[1])
    student = StudentSignal(hidden=q[0, 2:6], head=Head(weight=torch.eye(9)), positions=replace(mine, other=other))
    found = ULD(alignment="positional")(student, TeacherSignal(logits=p[0, 1:7]))
    torch.testing.assert_close(found.sum / found.count, theirs)


def test_a_teachers_top_k_serves_positional() -> None:
    case, objective = cross_case(), ULD(alignment="positional", top_k=4)
    logp, ids = logits(case)[1].log_softmax(-1).topk(5)
    teacher = TeacherSignal(logp=logp.flip(-1), ids=ids.flip(-1), support=Support.TOPK)
    torch.testing.assert_close(objective(case.student, teacher).sum, objective(case.student, case.teacher).sum)
    with pytest.raises(ValueError, match="the teacher's signal holds 5"):
        replace(objective, top_k=6)(case.student, teacher)
    for other in (ULD(), ULD(top_k=4), ULD(alignment="positional")):
        with pytest.raises(ValueError, match="accepts"):
            other(case.student, teacher)


def test_ranks_beyond_a_small_vocabulary_are_empty() -> None:
    q, p = torch.tensor([[0.2, 0.8]]), torch.tensor([[0.1, 0.4, 0.5]])
    for top, expected in ((0, 0.6), (3, 0.6), (2, 0.5), (1, 0.3)):
        assert float(ranked_distance(q, p, top=top)) == pytest.approx(expected)
        assert float(ranked_distance(p, q, top=top)) == pytest.approx(expected)


@pytest.mark.parametrize("layout", [(), (((-2, -1), (-1, -1)),)])
def test_no_chunk(layout: tuple[tuple[tuple[int, int], ...], ...]) -> None:
    case = cross_case(layout)
    found = ULD()(case.student, case.teacher)
    assert found.count == 0 and found.sum.item() == 0.0
    assert all((grad == 0).all() for grad in gradients(found.sum, case))
    frozen = replace(case.student, hidden=case.student.hidden.detach())
    ULD()(frozen, case.teacher).sum.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": "text"}, "alignment"),
        ({"temperature": 0.0}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"weight": 0}, "weight"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"ULD.{message}"):
        ULD(**options)


def test_needs_a_teacher() -> None:
    with pytest.raises(ValueError, match="give a teacher's signal"):
        ULD()(cross_case().student, None)

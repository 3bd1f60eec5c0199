"""MultiLevelOT against a loop over sequences, places and columns; Sinkhorn as the paper's code iterates it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdlib.kernels.sinkhorn import sinkhorn
from kdlib.objectives.cross.multi_level_ot import MultiLevelOT, standardised
from kdlib.types import DenseView, Support, TeacherSignal
from tests.objectives.cross_cases import CrossCase, cross_case, dense, of_sequences, random_layout
from tests.objectives.test_uld import SINGLE, central_differences, gradients, logits, rows_of, same


def softmax(z: Tensor) -> Tensor:
    """Of a row's logits over their standard deviation."""
    return (z / (z.std(-1, keepdim=True) + 1e-4)).softmax(-1)


def merged(z: Tensor, labels: list[int]) -> Tensor:
    """[V]: the chunk's probability in the place of its first token's."""
    p = softmax(z)
    whole = torch.stack([row[label] for row, label in zip(p, labels, strict=True)]).prod()
    return torch.stack([whole if v == labels[0] else mass for v, mass in enumerate(p[0])])


def of_chunks(case: CrossCase) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each sequence the distributions at its chunks, of student and teacher."""
    found: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
    for chunk in range(case.positions.chunks):
        for side, (z, at) in enumerate(zip(logits(case), (case.positions, case.other), strict=True)):
            rows, labels = rows_of(at, chunk)
            found.setdefault(int(at.sequence[rows[0]]), ([], []))[side].append(merged(z[rows], labels))
    return list(found.values())


def of_pairs(case: CrossCase) -> list[tuple[list[Tensor], list[Tensor]]]:
    found = []
    for sequence in case.positions.sequence.unique():
        sides = zip(logits(case), (case.positions, case.other), strict=True)
        q, p = (list(softmax(z[at.sequence == sequence])) for z, at in sides)
        length = min(len(q), len(p))
        found.append((q[:length], p[:length]))
    return found


def ranked(rows: list[Tensor], k: int) -> Tensor:
    """[n, k]: the columns with the largest sums."""
    sums = torch.stack(rows).sum(0).tolist()
    best = sorted(range(len(sums)), key=lambda v: -sums[v])[:k]
    return torch.stack([torch.stack([row[v] for v in best]) for row in rows])


def plan_cost(cost: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """<P, C> for P of mass one: rows and columns of exp(-C / epsilon) normalised in turn."""
    plan = (-cost / epsilon).exp()
    for _ in range(iterations):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    return (plan * cost).sum() / len(cost)


def oracle(case: CrossCase, objective: MultiLevelOT) -> Tensor:
    k = min(objective.top_k, *(z.shape[1] - 1 for z in logits(case)))
    total = torch.zeros((), dtype=torch.float64)
    for sides in (of_chunks if objective.alignment == "chunks" else of_pairs)(case):
        q, p = (ranked(rows, k) for rows in sides)
        for a, b in zip(q, p, strict=True):
            total = total + sum((x - y).abs() for x, y in zip(a, b, strict=True))
            pairs = [*zip(a, b, strict=True), (1 - a.sum(), 1 - b.sum())]
            total = total + objective.ranked_kl * sum(y * (y / x).log() for x, y in pairs)
        cost = torch.stack([torch.stack([(a - b).abs().sum() for b in p]) for a in q])
        moved = plan_cost(cost, epsilon=objective.epsilon, iterations=objective.iterations)
        total = total + objective.transport * len(q) * moved
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab", [(11, 13), (13, 11)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 4, "ranked_kl": 1.0, "transport": 1.0, "epsilon": 0.3, "iterations": 3},
        {"top_k": 5, "alignment": "positional"},
        {"top_k": 3, "ranked_kl": 0.0, "transport": 0.0},
    ],
)
def test_value_and_gradient(seed: int, vocab: tuple[int, int], options: dict[str, float]) -> None:
    objective = MultiLevelOT(**options)
    layout = ((((2, 1), (1, 3), (-1, -2), (1, 2)), ((1, 1),), ((3, 2),)), *map(random_layout, range(3)))[seed]
    case = cross_case(layout, seed=seed, vocab=vocab)
    found, expected = objective(case.student, case.teacher), oracle(case, objective)
    assert found.count == objective.total(case.positions)
    torch.testing.assert_close(found.sum, expected, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(found.sum, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_gradients_are_those_of_the_value() -> None:
    case = cross_case((((2, 1), (1, 2)), ((3, 2),)), vocab=(5, 4), width=(3, 3))
    objective = MultiLevelOT(top_k=2, ranked_kl=0.5, transport=0.5)
    expected = central_differences(lambda student: objective(student, case.teacher).sum, case.student)
    for a, b in zip(gradients(objective(case.student, case.teacher).sum, case), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def test_an_impossible_token_changes_no_other() -> None:
    """Logits of -inf, as of masked padding, count neither as mass nor in the standard deviation."""
    z = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([z, torch.full((3, 2), -torch.inf, dtype=torch.float64)], -1).requires_grad_()
    found = standardised(DenseView(padded))
    torch.testing.assert_close(found[:, :6].exp(), softmax(z))
    assert (found[:, 6:] == -torch.inf).all()
    found[:, :6].square().sum().backward()
    assert padded.grad.isfinite().all() and (padded.grad[:, 6:] == 0).all()


def test_a_row_whose_logits_are_all_equal() -> None:
    z = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    found = standardised(DenseView(z))
    found[:, 0].sum().backward()
    torch.testing.assert_close(found.exp(), torch.full_like(found, 0.2))
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("alignment", ["chunks", "positional"])
def test_models_that_agree_only_pay_for_the_plan(alignment: str) -> None:
    """Sinkhorn's plan is spread out; the two other terms are 0."""
    case = same(cross_case())
    free = MultiLevelOT(alignment=alignment, transport=0.0, top_k=4)
    assert abs(free(case.student, case.teacher).sum.item()) < 1e-12
    assert MultiLevelOT(alignment=alignment, top_k=4, epsilon=1.0)(case.student, case.teacher).sum > 1e-3


@pytest.mark.parametrize("seed", range(5))
def test_never_negative(seed: int) -> None:
    case = cross_case(random_layout(seed), seed=seed, scale=10.0)
    parts = [
        MultiLevelOT(top_k=3, ranked_kl=a, transport=b)(case.student, case.teacher).sum for a, b in ((0, 0), (1, 0), (0, 1))
    ]
    assert parts[0] > 0 and parts[1] > parts[0] and parts[2] > parts[0]


def test_the_names_of_tokens_do_not_matter() -> None:
    case = cross_case()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    other = replace(case.other, labels=order.argsort()[case.other.labels])
    student = replace(case.student, positions=replace(case.positions, other=other))
    expected = MultiLevelOT(top_k=4)(case.student, case.teacher).sum
    torch.testing.assert_close(MultiLevelOT(top_k=4)(student, TeacherSignal(logits=logits(case)[1][:, order])).sum, expected)
    torch.testing.assert_close(MultiLevelOT(top_k=4)(case.student, dense(case).teacher).sum, expected)


@pytest.mark.parametrize("alignment", ["chunks", "positional"])
def test_micro_batches_add_up(alignment: str) -> None:
    case, objective = cross_case(), MultiLevelOT(alignment=alignment, top_k=4)
    parts = [of_sequences(case, keep) for keep in ([0, 2], [1])]
    losses = [objective(part.student, part.teacher) for part in parts]
    whole = objective(case.student, case.teacher)
    total = losses[0].sum + losses[1].sum
    assert whole.count == losses[0].count + losses[1].count
    torch.testing.assert_close(total, whole.sum)
    for a, b in zip(gradients(total, case), gradients(whole.sum, case), strict=True):
        torch.testing.assert_close(a, b)


def test_many_rows_go_through_in_slices() -> None:
    """More than are made into logits at a time."""
    case = cross_case((((1, 1),) * 260, ((2, 1),) * 10), width=(4, 4))
    objective = MultiLevelOT(top_k=4, transport=0.0)
    torch.testing.assert_close(objective(case.student, case.teacher).sum, oracle(case, objective))


def test_the_kernel_iterates_as_the_papers_code() -> None:
    cost = torch.rand(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mass = torch.full((5,), 0.2, dtype=torch.float64).log()
    found = sinkhorn(cost, mass, mass, epsilon=0.1, iterations=10, loss="transport").value
    torch.testing.assert_close(found, plan_cost(cost, epsilon=0.1, iterations=10))


def test_single_precision_and_certain_models_are_finite() -> None:
    case = cross_case(dtype=torch.float32, scale=1e4)
    found = MultiLevelOT(top_k=4)(case.student, case.teacher).sum
    assert found.isfinite() and all(grad.isfinite().all() for grad in gradients(found, case))


def test_no_place() -> None:
    case = cross_case((((-2, -1),),))
    found = MultiLevelOT()(case.student, case.teacher)
    assert found.count == 0 and found.sum.item() == 0.0
    assert all((grad == 0).all() for grad in gradients(found.sum, case))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment": "text"}, "alignment"),
        ({"top_k": 0}, "top_k"),
        ({"iterations": 0}, "iterations"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"ranked_kl": -1.0}, "ranked_kl"),
        ({"transport": -1.0}, "transport"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"MultiLevelOT.{message}"):
        MultiLevelOT(**options)


def test_needs_a_full_signal() -> None:
    case = cross_case(SINGLE)
    logp, ids = logits(case)[1].log_softmax(-1).topk(5)
    with pytest.raises(ValueError, match="accepts"):
        MultiLevelOT()(case.student, TeacherSignal(logp=logp, ids=ids, support=Support.TOPK))

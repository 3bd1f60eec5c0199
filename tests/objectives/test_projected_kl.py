"""The student's distribution in the teacher's vocabulary, against plain sums over tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdlib.head import Head
from kdlib.kernels import row_values
from kdlib.objectives import ForwardKL
from kdlib.objectives.cross import Tables
from kdlib.objectives.cross.projected_kl import ProjectedKL
from kdlib.types import Support, TeacherSignal
from tests.objectives import oracle
from tests.objectives.cross_cases import CrossCase, check_gradients, cross_case, of_sequences, random_layout

OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 2.0},
    {"divergence": "reverse_kl"},
    {"divergence": "jsd"},
    {"divergence": "total_variation"},
    {"top_k": 3},
    {"top_k": 3, "divergence": "reverse_kl", "temperature": 0.5},
    {"top_k": 100},
]
ALONE = (2, 7)  # tokens of the student that become none


def case(**options: Any) -> CrossCase:
    """Of 13 tokens of the teacher, 11 are reached, some by several of the student's; a token can become one twice."""
    made = cross_case(**options)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 11, (11, 3), generator=generator)
    ids[:, 0] = torch.arange(11)
    ids[4, 1] = ids[4, 0]
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.09, 0.009], [0.7, 0.3, 0.0]])[torch.arange(11) % 3]
    weights = weights / weights.sum(-1, keepdim=True)
    weights[list(ALONE)] = 0.0
    return replace(made, tables=replace(made.tables, projection=(ids, weights)))


def rows_of(chunk: Tensor, chunks: int) -> list[int]:
    return [chunk.tolist().index(number) for number in range(chunks)]


def expected(case: CrossCase, objective: ProjectedKL) -> Tensor:
    """The sum over chunks from logits, token by token, by plain autograd."""
    assert case.teacher.hidden is not None and case.teacher.head is not None and case.tables.projection is not None
    ids, weights = case.tables.projection[0], case.tables.projection[1].double()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-9)
    T = objective.temperature
    q_all = (case.student.head(case.student.hidden) / T).softmax(-1)
    p_all = (case.teacher.head(case.teacher.hidden) / T).softmax(-1)
    reached = sorted({w for v in range(11) for w, share in zip(ids[v].tolist(), weights[v].tolist(), strict=True) if share})
    assert len(reached) < 13
    total = torch.zeros((), dtype=torch.float64)
    mine, theirs = (rows_of(side.chunk, case.positions.chunks) for side in (case.positions, case.other))
    for i, j in zip(mine, theirs, strict=True):
        projected = dict.fromkeys(reached, torch.zeros((), dtype=torch.float64))
        for v in range(11):
            for k in range(3):
                if weights[v, k]:
                    projected[int(ids[v, k])] = projected[int(ids[v, k])] + q_all[i, v] * weights[v, k]
        q = torch.stack([projected[w] for w in reached])
        p = p_all[j, reached]
        q, p, comparable = q / q.sum(), p / p.sum(), p.sum()
        if 0 < objective.top_k < len(reached):
            best = p.argsort(descending=True)[: objective.top_k]
            q, p = (torch.cat([x[best], 1.0 - x[best].sum(0, keepdim=True)]) for x in (q, p))
        total = total + comparable * between(objective.divergence, p, q)
    return total


def between(divergence: str, p: Tensor, q: Tensor) -> Tensor:
    if divergence == "jsd":
        m = (p + q) / 2
        return 0.5 * between("kl", p, m) + 0.5 * between("kl", q, m)
    if divergence == "total_variation":
        return 0.5 * (p - q).abs().sum()
    a, b = (p, q) if divergence == "kl" else (q, p)
    return (a * (a / b).log()).sum()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_plain_sums(options: dict[str, Any]) -> None:
    made, objective = case(), ProjectedKL(**options)
    found, wanted = objective(made.student, made.teacher, made.tables), expected(made, objective)
    assert found.count == made.positions.chunks == objective.total(made.positions)
    torch.testing.assert_close(found.sum, wanted, rtol=1e-9, atol=1e-9)
    inputs = (made.student.hidden, made.student.head.weight)
    for ours, theirs in zip(torch.autograd.grad(found.sum, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_values_of_other_probabilities() -> None:
    """One row by hand: tokens 0 and 1 become 0, token 2 becomes 0 and 1 by halves."""
    made = cross_case((((1, 1),),), vocab=(4, 3))
    tables = Tables(
        projection=(torch.tensor([[0, 0], [0, 0], [0, 1], [0, 0]]), torch.tensor([[1, 0], [1, 0], [0.5, 0.5], [0, 0]]))
    )
    logq, logp = (logp[0].exp().tolist() for logp in made.logp())
    inside = logq[0] + logq[1] + logq[2]
    q = [(logq[0] + logq[1] + logq[2] / 2) / inside, logq[2] / 2 / inside]
    mass = logp[0] + logp[1]
    wanted = mass * oracle.kl([logp[0] / mass, logp[1] / mass], q)
    assert ProjectedKL()(made.student, made.teacher, tables).sum.item() == pytest.approx(wanted, rel=1e-9)


def test_gradients_are_central_differences() -> None:
    made = case()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return ProjectedKL()(replace(made.student, hidden=hidden, head=Head(weight=weight)), made.teacher, made.tables).sum

    check_gradients(loss, made.student.hidden, made.student.head.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_tokenizer_is_the_forward_kl(dtype: torch.dtype) -> None:
    made = cross_case((((1, 1),) * 40,), vocab=(11, 11), dtype=dtype)
    tables = Tables(projection=(torch.arange(11)[:, None].expand(11, 2), torch.tensor([[1.0, 0.0]]).expand(11, 2)))
    for temperature in (1.0, 2.0):
        found = ProjectedKL(temperature=temperature)(made.student, made.teacher, tables)
        wanted = row_values(made.student, made.teacher, ForwardKL(temperature=temperature)).sum()
        assert found.sum.dtype == dtype
        torch.testing.assert_close(found.sum, wanted, rtol=1e-6, atol=1e-6)


def test_padded_heads_of_one_tokenizer() -> None:
    """Ids beyond the tokenizer become nothing: neither side's padding counts."""
    made = cross_case((((1, 1),) * 5,), vocab=(12, 14))
    weights = (torch.arange(12) < 10).float()[:, None]
    found = ProjectedKL()(made.student, made.teacher, Tables(projection=(torch.arange(12)[:, None], weights)))
    inside = [logp[:, :10].log_softmax(-1) for logp in made.logp()]
    wanted = made.logp()[1][:, :10].exp().sum(-1) * (inside[1].exp() * (inside[1] - inside[0])).sum(-1)
    torch.testing.assert_close(found.sum, wanted.sum())


def test_nothing_pulls_on_tokens_that_become_none() -> None:
    made = case()
    found = ProjectedKL()(made.student, made.teacher, made.tables)
    (gradient,) = torch.autograd.grad(found.sum, made.student.head.weight)
    pulled = (gradient.abs().sum(-1) > 1e-12).tolist()
    assert pulled == [v not in ALONE for v in range(11)]


def test_rises_with_top_k_to_all_tokens() -> None:
    made = case()
    values = [ProjectedKL(top_k=k)(made.student, made.teacher, made.tables).sum.item() for k in (1, 2, 4, 8, 0)]
    assert values == sorted(values)
    assert values[0] > 0


def test_first_rows_of_chunks_alone_count() -> None:
    made = case()
    first = rows_of(made.positions.chunk, made.positions.chunks)
    found = ProjectedKL()(made.student, made.teacher, made.tables)
    (gradient,) = torch.autograd.grad(found.sum, made.student.hidden)
    assert (gradient.abs().sum(-1) > 0).nonzero()[:, 0].tolist() == sorted(first)


@pytest.mark.parametrize("seed", range(4))
def test_micro_batches(seed: int) -> None:
    made = case(layout=(*random_layout(seed, sequences=3), ((1, 2),)), seed=seed)
    whole = ProjectedKL()(made.student, made.teacher, made.tables)
    parts = [of_sequences(made, keep) for keep in ([0, 2], [1], [3])]
    found = [ProjectedKL()(part.student, part.teacher, part.tables) for part in parts]
    assert sum(part.count for part in found) == whole.count
    split = torch.stack([part.sum for part in found]).sum()
    torch.testing.assert_close(split, whole.sum)
    gradients = [torch.autograd.grad(total, made.student.hidden)[0] for total in (split, whole.sum)]
    torch.testing.assert_close(*gradients)


def test_no_chunks() -> None:
    made = case(layout=(((-2, -1), (-1, -1)),))
    found = ProjectedKL()(made.student, made.teacher, made.tables)
    assert (found.sum.item(), found.count) == (0.0, 0)
    found.sum.backward()
    assert made.student.hidden.grad is not None and not made.student.hidden.grad.any()


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jsd", "total_variation"])
def test_large_gaps_are_finite(divergence: str) -> None:
    made = case(scale=150.0, dtype=torch.float32)
    gap = max(float((logp.amax(-1) - logp.amin(-1)).detach().max()) for logp in made.logp())
    assert gap > 200
    found = ProjectedKL(divergence=divergence)(made.student, made.teacher, made.tables)
    gradients = torch.autograd.grad(found.sum, (made.student.hidden, made.student.head.weight))
    assert math.isfinite(found.sum.item())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    if divergence == "kl":
        torch.testing.assert_close(found.sum.double(), expected(_wide(made), ProjectedKL()), rtol=1e-4, atol=1e-3)


def _wide(made: CrossCase) -> CrossCase:
    student = replace(made.student, hidden=made.student.hidden.double(), head=Head(weight=made.student.head.weight.double()))
    assert made.teacher.hidden is not None and made.teacher.head is not None
    teacher = TeacherSignal(hidden=made.teacher.hidden.double(), head=Head(weight=made.teacher.head.weight.double()))
    return replace(made, student=student, teacher=teacher)


def test_refused() -> None:
    made = case()
    for options, message in (
        ({"divergence": "l1"}, "kl, reverse_kl, total_variation, jsd"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"weight": 0.0}, "weight must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ProjectedKL(**options)
    with pytest.raises(ValueError, match="needs projection"):
        ProjectedKL()(made.student, made.teacher, Tables())
    assert made.tables.projection is not None
    ids, weights = made.tables.projection
    with pytest.raises(ValueError, match="projection is of 10 tokens, the student's head has 11"):
        ProjectedKL()(made.student, made.teacher, Tables(projection=(ids[:10], weights[:10])))
    with pytest.raises(ValueError, match="teacher's token 15, its head 13"):
        ProjectedKL()(made.student, made.teacher, Tables(projection=(ids + 5, weights)))
    with pytest.raises(ValueError, match="the teacher gives"):
        ProjectedKL()(made.student, made.given(), made.tables)
    assert made.given().support is Support.SAMPLED_STUDENT

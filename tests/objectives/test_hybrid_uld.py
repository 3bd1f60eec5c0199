"""Hybrid ULD: a divergence over what both vocabularies can say, ranks for the rest."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kdlib.kernels import linear_objective
from kdlib.objectives import GeneralizedJSD
from kdlib.objectives.cross import Tables
from kdlib.objectives.cross.hybrid_uld import HybridULD
from kdlib.types import Support, TeacherSignal
from tests.objectives import oracle as single
from tests.objectives.cross_cases import CrossCase, cross_case, dense, of_sequences, random_layout
from tests.objectives.test_uld import SINGLE, by_rank, central_differences, gradients, logits, rows_of, same

SIDES = (("student", 0), ("teacher", 1))


def outcomes(case: CrossCase, chunk: int, *, temperature: float) -> tuple[list[dict[object, Tensor]], list[list[Tensor]]]:
    """Of both sides: the mass of each outcome by its name, and the masses that make up the last one, "else"."""
    names = [{int(v): pair for pair, v in enumerate(side)} for side in case.tables.shared]
    found = [rows_of(side, chunk) for side in (case.positions, case.other)]
    begins = {names[side].get(found[side][1][0]) for side in (0, 1)}
    alike, rest = [], []
    for side, z in enumerate(logits(case)):
        rows, labels = found[side]
        p = (z[rows] / temperature).softmax(-1)
        whole = torch.stack([row[label] for row, label in zip(p, labels, strict=True)]).prod()
        masses: dict[object, Tensor] = {"chunk": whole}
        others = [p[0, labels[0]] - whole] if len(rows) > 1 else []
        for v in range(p.shape[1]):
            pair = names[side].get(v)
            if v == labels[0]:
                continue
            if pair is None or pair in begins:
                others.append(p[0, v])
            else:
                masses[pair] = p[0, v]
        masses["else"] = torch.stack([*others, torch.zeros((), dtype=p.dtype)]).sum()
        alike.append(masses), rest.append(others or [torch.zeros((), dtype=p.dtype)])
    return alike, rest


def oracle(case: CrossCase, objective: HybridULD, *, weights: tuple[float, float]) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for chunk in range(case.positions.chunks):
        (q, p), rest = outcomes(case, chunk, temperature=objective.temperature)
        assert q.keys() == p.keys()
        for name in q:
            m = objective.beta * p[name] + (1 - objective.beta) * q[name]
            if objective.beta in (0.0, 1.0):
                a, b = (p[name], q[name]) if objective.beta == 0.0 else (q[name], p[name])
                total = total + weights[0] * a * (a / b).log()
            elif m.item() > 0:
                of_p = p[name] * (p[name] / m).log() if p[name].item() else 0.0
                of_q = q[name] * (q[name] / m).log() if q[name].item() else 0.0
                total = total + weights[0] * (objective.beta * of_p + (1 - objective.beta) * of_q)
        total = total + weights[1] * by_rank(*rest)
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("vocab", [(11, 13), (13, 11)])
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, None),
        ({"beta": 0.1, "matched_weight": 2.0}, (2.0, None)),
        ({"beta": 0.0, "unmatched_weight": 0.0}, (None, 0.0)),
        ({"beta": 1.0, "temperature": 1.7, "matched_weight": 1.0, "unmatched_weight": 0.3}, (1.0, 0.3)),
        ({"matched_weight": 0.0}, (0.0, None)),
    ],
)
def test_value_and_gradient(
    seed: int, vocab: tuple[int, int], options: dict[str, float], weights: tuple[float | None, float | None] | None
) -> None:
    layout = ((((2, 1), (1, 3), (-1, -2), (1, 2)), ((1, 1), (2, 2)), ((3, 2),)), *map(random_layout, range(3)))[seed]
    case, objective = cross_case(layout, seed=seed, vocab=vocab), HybridULD(**options)
    share = 5 / vocab[1]
    w_m, w_u = weights or (None, None)
    filled = (share if w_m is None else w_m, 1 - share if w_u is None else w_u)
    found = objective(case.student, case.teacher, case.tables)
    expected = oracle(case, objective, weights=filled)
    assert found.count == objective.total(case.positions) == case.positions.chunks
    torch.testing.assert_close(found.sum, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(found.sum, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 1.0])
def test_gradients_are_those_of_the_value(beta: float) -> None:
    case, objective = cross_case((((2, 1), (1, 2)), ((3, 2),)), vocab=(6, 7), width=(3, 3)), HybridULD(beta=beta)
    expected = central_differences(lambda student: objective(student, case.teacher, case.tables).sum, case.student)
    found = objective(case.student, case.teacher, case.tables).sum
    for a, b in zip(gradients(found, case), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def one_tokenizer(case: CrossCase) -> CrossCase:
    """Rows and tokens of the student for both; the teacher's own hidden states."""
    teacher = TeacherSignal(hidden=case.teacher.hidden[: len(case.positions)], head=case.teacher.head)
    student = replace(case.student, positions=replace(case.positions, other=replace(case.positions, other=None)))
    ids = torch.arange(case.student.head.out_features)
    return replace(case, student=student, teacher=teacher, tables=Tables(shared=(ids, ids)))


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_with_one_tokenizer_it_is_the_generalized_jsd(beta: float) -> None:
    case = one_tokenizer(cross_case(SINGLE, vocab=(11, 11)))
    objective = HybridULD(beta=beta, matched_weight=1.0, temperature=1.4)
    found = objective(case.student, case.teacher, case.tables)
    expected = linear_objective(case.student, case.teacher, GeneralizedJSD(beta=beta, temperature=1.4))
    assert found.count == expected.count
    torch.testing.assert_close(found.sum, expected.sum, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(found.sum, case), gradients(expected.sum, case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert HybridULD(beta=beta)(case.student, case.teacher, case.tables).sum.item() > 0.0  # all weight on what is shared


def test_zero_where_both_agree() -> None:
    """In value and gradient, also where the vocabularies are known to share a part only."""
    case = same(cross_case())
    found = HybridULD()(case.student, case.teacher, replace(case.tables, shared=(torch.arange(4), torch.arange(4)))).sum
    assert abs(float(found)) < 1e-12
    matched = HybridULD(unmatched_weight=0.0)
    value = matched(case.student, case.teacher, replace(case.tables, shared=(torch.arange(4), torch.arange(4)))).sum
    assert all(grad.abs().max() < 1e-9 for grad in gradients(value, case))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("beta", [0.0, 0.2, 1.0])
def test_the_matched_part_is_never_negative(seed: int, beta: float) -> None:
    """TRL's is where the student has more mass on the shared tokens than the teacher has."""
    case = cross_case((((1, 1),),), seed=seed, scale=5.0)
    found = HybridULD(beta=beta, matched_weight=1.0, unmatched_weight=0.0)(case.student, case.teacher, case.tables).sum
    (q, p), _ = outcomes(case, 0, temperature=1.0)
    masses = [[float(side[name].detach()) for name in q] for side in (p, q)]
    expected = single.divergence(GeneralizedJSD(beta=beta), *masses)
    assert float(found) == pytest.approx(expected) and float(found) > 0.0


@pytest.mark.parametrize("shared", [0, 11])
def test_nothing_or_all_of_the_student_is_shared(shared: int) -> None:
    case = cross_case()
    case = replace(case, tables=Tables(shared=(torch.arange(shared), torch.arange(shared).flip(0))))
    objective = HybridULD()
    found = objective(case.student, case.teacher, case.tables).sum
    expected = oracle(case, objective, weights=(shared / 13, 1 - shared / 13))
    torch.testing.assert_close(found, expected)
    for a, b in zip(gradients(found, case), gradients(expected, case), strict=True):
        torch.testing.assert_close(a, b)


def test_certain_models_have_finite_gradients() -> None:
    case = cross_case(scale=1e4, dtype=torch.float32)
    found = HybridULD()(case.student, case.teacher, case.tables).sum
    assert found.isfinite() and all(grad.isfinite().all() for grad in gradients(found, case))


def test_the_names_of_tokens_do_not_matter() -> None:
    case = cross_case()
    order = torch.randperm(13, generator=torch.Generator().manual_seed(1))
    new = order.argsort()
    student = replace(case.student, positions=replace(case.positions, other=replace(case.other, labels=new[case.other.labels])))
    tables = Tables(shared=(case.tables.shared[0].flip(0), new[case.tables.shared[1]].flip(0)))
    found = HybridULD()(student, TeacherSignal(logits=logits(case)[1][:, order]), tables).sum
    torch.testing.assert_close(found, HybridULD()(case.student, case.teacher, case.tables).sum)
    torch.testing.assert_close(found, HybridULD()(case.student, dense(case).teacher, case.tables).sum)


def test_micro_batches_add_up() -> None:
    case, objective = cross_case(), HybridULD()
    parts = [of_sequences(case, keep) for keep in ([0, 2], [1])]
    losses = [objective(part.student, part.teacher, case.tables) for part in parts]
    whole = objective(case.student, case.teacher, case.tables)
    total = losses[0].sum + losses[1].sum
    assert whole.count == losses[0].count + losses[1].count
    torch.testing.assert_close(total, whole.sum)
    for a, b in zip(gradients(total, case), gradients(whole.sum, case), strict=True):
        torch.testing.assert_close(a, b)


def test_no_chunk() -> None:
    case = cross_case((((-2, -1),),))
    found = HybridULD()(case.student, case.teacher, case.tables)
    assert found.count == 0 and found.sum.item() == 0.0
    assert all((grad == 0).all() for grad in gradients(found.sum, case))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 1.5}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"matched_weight": -1.0}, "matched_weight"),
        ({"unmatched_weight": -1.0}, "unmatched_weight"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"HybridULD.{message}"):
        HybridULD(**options)


def test_both_weights_zero() -> None:
    with pytest.raises(ValueError, match="both weights are 0"):
        HybridULD(matched_weight=0.0, unmatched_weight=0.0)


def test_what_it_needs() -> None:
    case = cross_case()
    with pytest.raises(ValueError, match="HybridULD needs shared"):
        HybridULD()(case.student, case.teacher)
    logp, ids = logits(case)[1].log_softmax(-1).topk(5)
    with pytest.raises(ValueError, match="accepts"):
        HybridULD()(case.student, TeacherSignal(logp=logp, ids=ids, support=Support.TOPK), case.tables)

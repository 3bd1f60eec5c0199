"""Signals that hold only a part of the vocabulary: the likeliest ids, or ids drawn from one of the models."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from kdlib.kernels import linear_objective
from kdlib.objectives import (
    TAID,
    AdaptiveKL,
    AlphaBeta,
    BalancedKL,
    CrossEntropy,
    DecoupledTopK,
    ForwardKL,
    GeneralizedJSD,
    Interpolated,
    LKHybrid,
    NegLogAcceptance,
    PlackettLuce,
    ReverseKL,
    RowObjective,
    SelectiveKL,
    SkewKL,
    SkewReverseKL,
    Sum,
    TotalVariation,
)
from kdlib.types import Head, Loss, Positions, StudentSignal, Support, TeacherSignal, feeds
from tests.objectives import oracle
from tests.objectives.cases import logits

N, V = 4, 9
ON_TOP_K: dict[str, RowObjective] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd": GeneralizedJSD(beta=0.3),
    "skew_kl": SkewKL(),
    "skew_reverse_kl": SkewReverseKL(),
    "alpha_beta": AlphaBeta(),
    "adaptive_kl": AdaptiveKL(),
    "balanced_kl": BalancedKL(),
    "total_variation": TotalVariation(),
    "nla": NegLogAcceptance(),
    "lk_hybrid": LKHybrid(),
    "selective_kl": SelectiveKL(),
    "interpolated": Interpolated(t=0.4),
    "taid": TAID(),
    "decoupled_top_k": DecoupledTopK(k=3, tau=2.0),
    "plackett_luce": PlackettLuce(top_k=3, label_first=False),
    "cross_entropy": CrossEntropy(),
    "sum": Sum(parts=((0.5, ForwardKL()), (0.5, CrossEntropy()))),
}
on_top_k = pytest.mark.parametrize("objective", ON_TOP_K.values(), ids=ON_TOP_K)
data_processing = pytest.mark.parametrize(
    "objective",
    [ForwardKL(), ReverseKL(), GeneralizedJSD(), TotalVariation(), NegLogAcceptance(), LKHybrid()],
    ids=lambda o: type(o).__name__,
)


def graded(objective: RowObjective, student: Tensor, teacher: TeacherSignal | None) -> tuple[Loss, Tensor]:
    """Loss and gradient with respect to the student's logits, which an identity head hands on."""
    hidden = student.detach().clone().requires_grad_()
    rows = torch.arange(len(student))
    signal = StudentSignal(
        hidden=hidden,
        head=Head(weight=torch.eye(student.shape[-1], dtype=student.dtype)),
        positions=Positions(index=rows, labels=rows % student.shape[-1], sequence=torch.zeros_like(rows)),
    )
    loss = linear_objective(signal, teacher, objective)
    return loss, torch.autograd.grad(loss.sum, hidden)[0]


def top(teacher: Tensor, k: int, *, dtype: torch.dtype = torch.float64, temperature: float = 1.0) -> TeacherSignal:
    """The k likeliest ids with the mass outside, as a cache stores them."""
    logp, ids = (teacher / temperature).log_softmax(-1).sort(dim=-1, descending=True)
    return TeacherSignal(
        logp=logp[:, :k].to(dtype),
        ids=ids[:, :k],
        rest=logp[:, k:].logsumexp(-1).to(dtype),
        support=Support.TOPK,
        temperature=temperature,
    )


@on_top_k
def test_all_of_the_vocabulary_as_top_k_is_the_dense_loss(objective: RowObjective) -> None:
    student, teacher, _ = logits(N, vocab=V)
    dense, of_dense = graded(objective, student, TeacherSignal(logits=teacher))
    found, of_found = graded(objective, student, top(teacher, V))
    torch.testing.assert_close(found.sum, dense.sum)
    torch.testing.assert_close(of_found, of_dense)


_OTHERS = DecoupledTopK | PlackettLuce | CrossEntropy | Sum | TAID
DIVERGENCES = {name: objective for name, objective in ON_TOP_K.items() if not isinstance(objective, _OTHERS)}


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_top_k_is_the_divergence_of_k_tokens_and_the_rest(name: str, k: int) -> None:
    objective, (student, teacher, _) = DIVERGENCES[name], logits(N, vocab=V)
    value, step = 0.0, 1e-6
    for s, z in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = oracle.softmax(z), oracle.softmax(s)
        ids = oracle.best(p, k)
        if name == "adaptive_kl":  # the mass outside is tail, however large it is
            value += _adaptive(objective, oracle.coarse(p, ids), oracle.coarse(q, ids))
        else:
            value += oracle.divergence(objective, oracle.coarse(p, ids), oracle.coarse(q, ids))
    loss, gradient = graded(objective, student, top(teacher, k))
    assert loss.sum.item() == pytest.approx(value)
    if name in ("adaptive_kl", "interpolated", "lk_hybrid"):
        return  # a stopped gradient is no derivative of the value
    along = torch.randn_like(student)
    there, back = (graded(objective, student + x * along, top(teacher, k))[0].sum for x in (step, -step))
    assert ((there - back) / (2 * step)).item() == pytest.approx((gradient * along).sum().item(), rel=1e-5)


def _adaptive(objective: RowObjective, p: list[float], q: list[float]) -> float:
    assert isinstance(objective, AdaptiveKL)
    head, mass = 0, 0.0
    while mass < objective.mu and head < len(p) - 1:
        mass, head = mass + p[head], head + 1
    gaps = [abs(a - b) for a, b in zip(p, q, strict=True)]
    share = math.fsum(gaps[:head]) / math.fsum(gaps)
    return share * oracle.kl(p, q) + (1 - share) * oracle.kl(q, p)


@data_processing
def test_top_k_is_a_lower_bound_that_rises_to_the_dense_loss(objective: RowObjective) -> None:
    student, teacher, _ = logits(N, vocab=V)
    values = [graded(objective, student, top(teacher, k))[0].sum.item() for k in range(1, V + 1)]
    assert all(low <= high + 1e-12 for low, high in pairwise(values))
    assert 0 < values[0] < values[-1]
    dense, _ = graded(objective, student, TeacherSignal(logits=teacher))
    assert values[-1] == pytest.approx(dense.sum.item())


def test_decoupled_top_k_without_tempering_is_forward_kl_over_k_plus_one_outcomes() -> None:
    student, teacher, _ = logits(N, vocab=V)
    signal = top(teacher, 4)
    decoupled, of_decoupled = graded(DecoupledTopK(k=4), student, signal)
    plain, of_plain = graded(ForwardKL(), student, signal)
    torch.testing.assert_close(decoupled.sum, plain.sum)
    torch.testing.assert_close(of_decoupled, of_plain)


@pytest.mark.parametrize("name", ["decoupled_top_k", "plackett_luce"])
def test_objectives_of_the_top_k_take_it_from_a_dense_signal_themselves(name: str) -> None:
    student, teacher, _ = logits(N, vocab=V)
    dense, of_dense = graded(ON_TOP_K[name], student, TeacherSignal(logits=teacher))
    for k in (3, 6):
        found, of_found = graded(ON_TOP_K[name], student, top(teacher, k))
        torch.testing.assert_close(found.sum, dense.sum)
        torch.testing.assert_close(of_found, of_dense)


@on_top_k
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_log_probs_stored_in_16_bits_are_still_a_distribution(objective: RowObjective, dtype: torch.dtype) -> None:
    teacher = logits(N, vocab=V)[1].float()
    for signal in (top(teacher, 4, dtype=dtype), top(teacher, V, dtype=dtype)):
        view = signal.at(slice(None), 1.0)
        assert view.logp.dtype == torch.float32
        total = view.logp.exp().sum(-1) + view.rest.exp()
        torch.testing.assert_close(total, torch.ones(N))
        loss, gradient = graded(objective, teacher, signal)  # the student whose own outputs were stored
        assert gradient.isfinite().all()
        assert isinstance(objective, CrossEntropy | Sum | PlackettLuce) or -1e-6 <= loss.sum.item() < 0.05


def test_without_a_stored_rest_the_mass_outside_is_what_is_missing_to_one() -> None:
    _, teacher, _ = logits(N, vocab=V)
    whole, part = top(teacher, 4), top(teacher, 4)
    bare = TeacherSignal(logp=part.logp, ids=part.ids, support=Support.TOPK)
    torch.testing.assert_close(bare.at(slice(None), 1.0).rest, whole.rest)
    assert bare.at(slice(0, 2), 1.0).logp.shape == (2, 4)


# Ids drawn from a model, every id in turn, weighted by the probability of drawing it --------------


def expected(objective: RowObjective, student: Tensor, teacher: Tensor, support: Support) -> tuple[float, Tensor]:
    logp = teacher.log_softmax(-1)
    drawn_from = (teacher if support is Support.SAMPLED_TEACHER else student).softmax(-1)
    value, gradient = 0.0, torch.zeros_like(student)
    for row in range(len(student)):
        for v in range(student.shape[-1]):
            signal = TeacherSignal(logp=logp[row : row + 1, v : v + 1], ids=torch.tensor([[v]]), support=support)
            loss, of_loss = graded(objective, student[row : row + 1], signal)
            value += drawn_from[row, v].item() * loss.sum.item()
            gradient[row] += drawn_from[row, v] * of_loss[0]
    return value, gradient


@pytest.mark.parametrize(
    ("objective", "support"),
    [
        (ForwardKL(), Support.SAMPLED_TEACHER),
        (SkewKL(), Support.SAMPLED_TEACHER),
        (SkewKL(alpha=0.6), Support.SAMPLED_TEACHER),
        (ReverseKL(), Support.SAMPLED_STUDENT),
    ],
    ids=str,
)
def test_sampled_ids_give_the_dense_loss_and_gradient_on_average(objective: RowObjective, support: Support) -> None:
    student, teacher, _ = logits(3, vocab=6)
    dense, of_dense = graded(objective, student, TeacherSignal(logits=teacher))
    value, gradient = expected(objective, student, teacher, support)
    assert value == pytest.approx(dense.sum.item())
    torch.testing.assert_close(gradient, of_dense)


@pytest.mark.parametrize(
    ("objective", "support"),
    [(ForwardKL(), Support.SAMPLED_TEACHER), (ReverseKL(), Support.SAMPLED_STUDENT)],
    ids=str,
)
def test_several_draws_are_averaged(objective: RowObjective, support: Support) -> None:
    student, teacher, _ = logits(1, vocab=6)
    logp = teacher.log_softmax(-1)

    def loss(ids: list[int]) -> tuple[Loss, Tensor]:
        drawn = torch.tensor([ids])
        return graded(objective, student, TeacherSignal(logp=logp.gather(-1, drawn), ids=drawn, support=support))

    (once, of_once), (other, of_other), (both, of_both) = loss([2]), loss([4]), loss([2, 2, 2, 4])
    assert both.sum.item() == pytest.approx(0.75 * once.sum.item() + 0.25 * other.sum.item())
    torch.testing.assert_close(of_both, 0.75 * of_once + 0.25 * of_other)


def test_a_drawn_id_that_the_teacher_never_emits_is_infinite_with_a_finite_gradient() -> None:
    student, _, _ = logits(1, vocab=6)
    signal = TeacherSignal(logp=torch.tensor([[-torch.inf]]), ids=torch.tensor([[2]]), support=Support.SAMPLED_STUDENT)
    loss, gradient = graded(ReverseKL(), student, signal)
    assert loss.sum.item() == math.inf and gradient.isfinite().all() and gradient[0, 2] > 0


# Refusals -----------------------------------------------------------------------------------------

_SAMPLED = Support.SAMPLED_TEACHER | Support.SAMPLED_STUDENT
REFUSED = [
    *((o, s) for o in ON_TOP_K.values() for s in _SAMPLED if o.accepts and not feeds(s, o.accepts)),
    (PlackettLuce(), Support.TOPK),
    (Sum(parts=((0.5, ForwardKL()), (0.5, PlackettLuce()))), Support.TOPK),
    (Sum(parts=((0.5, ForwardKL()), (0.5, ReverseKL()))), Support.SAMPLED_TEACHER),
]


@pytest.mark.parametrize(("objective", "support"), REFUSED, ids=lambda x: getattr(x, "name", type(x).__name__))
def test_an_objective_that_a_signal_cannot_feed_says_so_naming_both(objective: RowObjective, support: Support) -> None:
    student, teacher, _ = logits(N, vocab=V)
    signal = TeacherSignal(logp=teacher.log_softmax(-1)[:, :2], ids=torch.tensor([[0, 1]]).expand(N, 2), support=support)
    with pytest.raises(ValueError, match=rf"{type(objective).__name__} accepts .*{support.name}"):
        graded(objective, student, signal)


def test_who_accepts_what() -> None:
    sampled = {name for name, o in ON_TOP_K.items() if o.accepts and o.accepts & _SAMPLED}
    assert sampled == {"forward_kl", "selective_kl", "skew_kl", "reverse_kl", "sum"}
    assert CrossEntropy().accepts is None
    assert PlackettLuce().accepts == Support.FULL
    with pytest.raises(ValueError, match="ReverseKL needs a teacher's signal"):
        graded(ReverseKL(), torch.zeros(2, 3), None)


def test_a_truncated_signal_is_not_retempered() -> None:
    student, teacher, _ = logits(N, vocab=V)
    graded(ForwardKL(temperature=2.0), student, top(teacher, 4, temperature=2.0))
    with pytest.raises(ValueError, match=r"captured at temperature 2.0 cannot be re-tempered to 1.0"):
        graded(ForwardKL(), student, top(teacher, 4, temperature=2.0))


@pytest.mark.parametrize(
    "objective",
    [DecoupledTopK(k=5), PlackettLuce(top_k=5, label_first=False)],
    ids=lambda o: type(o).__name__,
)
def test_more_ids_than_the_signal_holds_are_refused(objective: RowObjective) -> None:
    student, teacher, _ = logits(N, vocab=V)
    with pytest.raises(ValueError, match=r"top 5 are asked for, the teacher's signal holds 4"):
        graded(objective, student, top(teacher, 4))

"""Sinkhorn on heads and signals: chunk borders, top-k teachers, draws of rows; and what it refuses."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdlib.objectives import TAID, CrossEntropy, ForwardKL, RowObjective, SampledReverseKL, Sinkhorn, Sum
from kdlib.objectives.sinkhorn import TokenPoints
from kdlib.types import Head, Support, TeacherSignal
from tests.objectives import sinkhorn_oracle as oracle
from tests.objectives.cases import logits
from tests.objectives.test_sinkhorn import SEQUENCE, N, V, graded, groups, of, one_row, signal
from tests.objectives.test_supports import top
from tests.objectives.test_values import graded as graded_logits


def linear(n: int, *, vocab: int = 20, width: int = 8) -> tuple[Tensor, Head, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight, teacher = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, width), (vocab, width), (n, vocab))
    )
    return hidden.requires_grad_(), Head(weight=weight.requires_grad_()), teacher


ON_HEADS: dict[str, Sinkhorn] = {
    "default": Sinkhorn(iterations=3),
    "top_k": Sinkhorn(iterations=3, top_k=5),
    "dual": Sinkhorn(iterations=3, loss="dual", cost="sqeuclidean"),
    "debiased": Sinkhorn(iterations=3, debiased=True),
    "debiased_dual": Sinkhorn(iterations=3, debiased=True, loss="dual"),
}


def assert_same_on_logits(options: Sinkhorn, sizes: list[int]) -> None:
    """A head's loss and gradients, with groups of these sizes, against those of its logits."""
    hidden, head, teacher = linear(sum(sizes))
    sequence = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    loss = options(signal(hidden, head, sequence=sequence), of(teacher))
    found = torch.autograd.grad(loss.sum, [hidden, head.weight])
    ours, theirs = (z.expand(len(sizes), -1, -1) for z in (head(hidden), teacher))
    wanted = options.on_logits(ours, theirs, mask=torch.nn.functional.one_hot(sequence).T)
    assert loss.count == wanted.count == sum(sizes)
    torch.testing.assert_close(loss.sum, wanted.sum)
    for x, y in zip(found, torch.autograd.grad(wanted.sum, [hidden, head.weight]), strict=True):
        torch.testing.assert_close(x, y)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 20 student rows, of 16 where rows are points on the other side."""
    monkeypatch.setattr(importlib.import_module("kdlib.kernels.chunked"), "CPU_CHUNK", 20)
    monkeypatch.setattr("kdlib.objectives.sinkhorn.batch.CHUNK", 16)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", ON_HEADS.values(), ids=ON_HEADS)
@groups
def test_a_head_whose_chunks_cut_groups_is_on_logits(options: Sinkhorn, group: Any) -> None:
    assert_same_on_logits(replace(options, group=group), [9, 25, 3, 17])


def test_a_head_with_more_rows_than_a_chunk_is_on_logits() -> None:
    assert_same_on_logits(Sinkhorn(iterations=2, group="sequence"), [100, 290, 210])


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", ON_HEADS.values(), ids=ON_HEADS)
def test_a_teachers_head_is_its_logits(options: Sinkhorn) -> None:
    hidden, head, _ = linear(47)
    theirs, weight, _ = linear(47, width=5)
    teacher = TeacherSignal(hidden=theirs.detach(), head=weight.detached())
    found = options(signal(hidden, head), teacher)
    wanted = options(signal(hidden, head), of(weight(theirs).detach()))
    torch.testing.assert_close(found.sum, wanted.sum)
    for x, y in zip(*(torch.autograd.grad(loss.sum, [hidden, head.weight]) for loss in (found, wanted)), strict=True):
        torch.testing.assert_close(x, y)


def test_nothing_flows_to_the_teacher() -> None:
    for options in (Sinkhorn(), Sinkhorn(top_k=3), Sinkhorn(debiased=True)):
        student, teacher, _ = logits(N, vocab=V)
        teacher.requires_grad_()
        for loss in (
            options(signal(student.clone().requires_grad_(), Head(weight=torch.eye(V).double())), of(teacher)),
            options.on_logits(student.clone().requires_grad_(), teacher),
        ):
            loss.sum.backward()
        assert teacher.grad is None


@pytest.mark.parametrize("cost", ["l1", "sqeuclidean"])
@pytest.mark.parametrize("k", [1, 3, V])
def test_a_top_k_teacher_is_the_dense_one_with_that_top_k(cost: Any, k: int) -> None:
    student, teacher, _ = logits(N, vocab=V)
    options = Sinkhorn(cost=cost)
    wanted, gradient = graded(replace(options, top_k=k), student, teacher)
    found, of_found = graded(options, student, top(teacher, k, temperature=2.0))
    torch.testing.assert_close(found.sum, wanted.sum)
    torch.testing.assert_close(of_found, gradient)
    fewer, _ = graded(replace(options, top_k=1), student, top(teacher, k, temperature=2.0))
    torch.testing.assert_close(fewer.sum, graded(replace(options, top_k=1), student, teacher)[0].sum)


@pytest.mark.parametrize(
    "options", [Sinkhorn(), Sinkhorn(top_k=2), Sinkhorn(debiased=True)], ids=["dense", "top_2", "debiased"]
)
@one_row
def test_the_smallest_draws_say_which_rows_take_part(options: Sinkhorn) -> None:
    student, teacher, _ = logits(N, vocab=V)
    uniform = torch.tensor([0.9, 0.1, 0.4, 0.8, 0.3, 0.7])
    loss, gradient = graded(replace(options, max_rows=3), student, teacher, uniform=uniform)
    kept = [1, 2, 4]
    alone = oracle.batch(options, student[kept].tolist(), teacher[kept].tolist())
    assert loss.count == N and loss.sum.item() == pytest.approx(alone * N / 3)
    assert gradient.abs().sum(-1).bool().nonzero().flatten().tolist() == kept
    by_sequence = replace(options, max_rows=2, group="sequence")
    loss, gradient = graded(by_sequence, student, teacher, uniform=uniform, sequence=torch.tensor(SEQUENCE))
    pairs = [([0, 1], 2), ([2, 4], 3), ([5], 1)]  # the rows of each sequence that take part, and all it has
    wanted = sum(oracle.batch(options, student[i].tolist(), teacher[i].tolist()) / len(i) * n for i, n in pairs)
    assert loss.count == N and loss.sum.item() == pytest.approx(wanted)
    assert not gradient[3].any()


def test_without_draws_the_same_rows_take_part_every_time() -> None:
    student, teacher, _ = logits(40, vocab=V)
    options = Sinkhorn(max_rows=9)
    loss, gradient = graded(options, student, teacher)
    again, of_again = graded_logits(options, student, teacher)  # type: ignore[arg-type]
    assert loss.count == again.count == 40
    torch.testing.assert_close(again.sum, loss.sum)
    torch.testing.assert_close(of_again, gradient)
    assert int(gradient.abs().sum(-1).bool().sum()) == 9


def test_no_row_is_a_loss_of_zero() -> None:
    hidden, head, teacher = linear(0)
    loss = Sinkhorn()(signal(hidden, head), of(teacher))
    loss.sum.backward()
    assert loss.count == 0 and loss.sum.item() == 0.0 and hidden.grad is not None


# Refusals ---------------------------------------------------------------------------------------------


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "epsilon_0": ({"epsilon": 0.0}, r"Sinkhorn.epsilon must be above 0, not 0.0"),
    "epsilon_negative": ({"epsilon": -1.0}, r"Sinkhorn.epsilon must be above 0"),
    "epsilon_nan": ({"epsilon": float("nan")}, r"Sinkhorn.epsilon must be above 0"),
    "temperature_0": ({"temperature": 0.0}, r"Sinkhorn.temperature must be above 0, not 0.0"),
    "iterations_0": ({"iterations": 0}, r"Sinkhorn.iterations must be at least 1, not 0"),
    "max_rows_1": ({"max_rows": 1}, r"Sinkhorn.max_rows must be at least 2, not 1"),
    "top_k_0": ({"top_k": 0}, r"Sinkhorn.top_k must be at least 1, not 0"),
    "weight_negative": ({"weight": -0.1}, r"Sinkhorn.weight must be at least 0, not -0.1"),
    "cost": ({"cost": "l2"}, r"Sinkhorn.cost must be l1 or sqeuclidean, not 'l2'"),
    "geometry": ({"geometry": "token"}, r"Sinkhorn.geometry must be batch or sample, not 'token'"),
    "loss": ({"loss": "primal"}, r"Sinkhorn.loss must be transport or dual, not 'primal'"),
    "group": ({"group": "all"}, r"Sinkhorn.group must be batch or sequence, not 'all'"),
    "token_cost": ({"token_cost": "dot"}, r"Sinkhorn.token_cost must be cosine or sqeuclidean or l1, not 'dot'"),
    "normalize": ({"normalize": "sum"}, r"Sinkhorn.normalize must be mean or sinkd, not 'sum'"),
    "debiased_top_k": ({"debiased": True, "top_k": 4}, r"compares whole distributions: leave out top_k"),
    "no_divergence": ({"divergence": None}, r"blind to the order of rows: it needs a divergence, such as ForwardKL"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_out_of_range_or_without_effect_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sinkhorn(**options)


@pytest.mark.parametrize(
    "divergence",
    [SampledReverseKL(), CrossEntropy(), TAID(), Sum(parts=((1.0, ForwardKL()), (1.0, TAID())))],
    ids=lambda o: type(o).__name__,
)
def test_divergences_that_are_none_of_two_models_are_refused(divergence: RowObjective) -> None:
    for geometry in ("batch", "sample"):
        with pytest.raises(ValueError, match=f"Sinkhorn.divergence cannot be {type(divergence).__name__}: choose one of two"):
            Sinkhorn(divergence=divergence, geometry=geometry)  # type: ignore[arg-type]


def test_what_a_teacher_must_give() -> None:
    assert Sinkhorn().accepts == Support.FULL | Support.TOPK
    assert Sinkhorn(debiased=True).accepts == Support.FULL
    assert Sinkhorn(debiased=True, geometry="sample").accepts == Support.FULL | Support.TOPK


def test_signals_that_do_not_fit_are_refused() -> None:
    student, teacher, _ = logits(N, vocab=V)
    logp, ids = teacher.log_softmax(-1).topk(3)
    for support in (Support.SAMPLED_TEACHER, Support.SAMPLED_STUDENT):
        with pytest.raises(ValueError, match=r"Sinkhorn accepts .*, the teacher gives Support.SAMPLED"):
            graded(Sinkhorn(), student, TeacherSignal(logp=logp, ids=ids, support=support))
    kept = top(teacher, 3, temperature=2.0)
    with pytest.raises(ValueError, match=r"Sinkhorn accepts Support.FULL, the teacher gives Support.TOPK"):
        graded(Sinkhorn(debiased=True), student, kept)
    with pytest.raises(ValueError, match="the top 4 are asked for, the teacher's signal holds 3"):
        graded(Sinkhorn(top_k=4), student, kept)
    with pytest.raises(ValueError, match=f"the top {V + 1} are asked for, the teacher's signal holds {V}"):
        graded(Sinkhorn(top_k=V + 1), student, teacher)
    with pytest.raises(ValueError, match=r"captured at temperature 1.0 cannot be re-tempered to 2.0"):
        graded(Sinkhorn(), student, top(teacher, 3))
    with pytest.raises(ValueError, match="the teacher speaks of 4 rows, the student of 6"):
        graded(Sinkhorn(), student, teacher[:4])
    with pytest.raises(ValueError, match="positions with weights cannot be transported"):
        graded(Sinkhorn(), student, teacher, weight=torch.ones(N))


def test_calls_without_a_teacher_or_rows_are_refused() -> None:
    student, teacher, labels = logits(N, vocab=V)
    with pytest.raises(ValueError, match="Sinkhorn compares two models: give teacher_logits"):
        Sinkhorn().on_logits(student)
    with pytest.raises(ValueError, match="Sinkhorn needs a teacher's signal"):
        Sinkhorn()(signal(student, Head(weight=torch.eye(V).double())), None)
    for nothing in ({"mask": torch.zeros(N, dtype=torch.bool)}, {"labels": torch.full((N,), -100)}):
        with pytest.raises(ValueError, match="no row is scored: mask or labels leave out all of them"):
            Sinkhorn().on_logits(student, teacher, **nothing)
    with pytest.raises(ValueError, match=r"teacher_logits covers positions \(4,\), student_logits \(6,\)"):
        Sinkhorn().on_logits(student, teacher[:4], labels=labels)


def test_geometry_sample_asks_for_token_vectors() -> None:
    student, teacher, _ = logits(N, vocab=V)
    with pytest.raises(ValueError, match=r"use SinkhornTrainer, or Sinkhorn\(...\).over\(TokenPoints\(...\)\)"):
        graded(Sinkhorn(geometry="sample"), student, teacher)
    with pytest.raises(ValueError, match="geometry sample moves mass between tokens: give points, a TokenPoints"):
        Sinkhorn(geometry="sample").on_logits(student, teacher)
    points = TokenPoints(student=torch.randn(V, 3, generator=torch.Generator().manual_seed(0)))
    assert Sinkhorn(geometry="sample").on_logits(student, teacher, points=points).count == N

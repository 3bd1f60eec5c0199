"""Diffusion objectives with a teacher, against loops over tokens: which view teaches which token, and by how much."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from kdlib.diffusion import Noise
from kdlib.objectives import (
    TAID,
    CrossEntropy,
    DiffusionForcing,
    ForwardKL,
    MaskConsistency,
    ReverseKL,
    SampledReverseKL,
    SharpenedKL,
    StepHalving,
)
from kdlib.objectives.diffusion import DiffusionObjective
from kdlib.types import Support
from tests.objectives.diffusion_cases import Table, V, loss_of, noise, one_row, rows, step_loss, terms

OBJECTIVES: dict[str, tuple[DiffusionObjective, str]] = {
    "consistency": (MaskConsistency(), "uniform"),
    "consistency_fixed": (MaskConsistency(share_range=(0.4, 0.4), cross_entropy_weight=0.0, weight=2.0), "blocks"),
    "cdlm": (MaskConsistency(divergence=ReverseKL(temperature=2.0), distill_weight=0.5), "trajectory"),
    "sharpened": (SharpenedKL(), "blocks"),
    "sharpened_alone": (SharpenedKL(temperature=0.25, cross_entropy_weight=0.0, weight=3.0), "response"),
    "halving": (StepHalving(sampling_steps=4, rounds=1), "uniform"),
    "halving_in_three": (StepHalving(sampling_steps=8, teacher_steps=3, rounds=1, divergence=ForwardKL()), "uniform"),
    "forcing": (DiffusionForcing(), "monotone"),
}
every = pytest.mark.parametrize("objective, kind", OBJECTIVES.values(), ids=OBJECTIVES)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of two log-distributions, outcome by outcome."""
    return torch.stack([a.exp() * (a - b) for a, b in zip(p, q, strict=True)]).sum()


def between(divergence: object, teacher: Tensor, student: Tensor) -> Tensor:
    t = divergence.temperature  # type: ignore[attr-defined]
    p, q = (teacher / t).log_softmax(0), (student / t).log_softmax(0)
    return kl(p, q) if isinstance(divergence, ForwardKL) else kl(q, p)


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() / len(values) if values else torch.zeros((), dtype=torch.float64)


def by_loops(objective: DiffusionObjective, of: Noise, student: Tensor, teacher: Tensor) -> Tensor:
    """The loss of a step from logits [views, B, S, V] of both models."""
    ids, S = of.rows.ids, of.rows.ids.shape[1]
    tokens = [(b, i) for b in range(len(ids)) for i in range(S) if of.segment[b, i] and of.u[b, i] < of.p[b, i]]
    hard = {at: -student[(0, *at)].log_softmax(0)[ids[at]] for at in tokens}
    if isinstance(objective, MaskConsistency):
        low, high = objective.share_range
        later = [(b, i) for b, i in tokens if of.u[b, i] < (low + (high - low) * of.v[b]) * of.p[b, i]]
        kept = mean([between(objective.divergence, teacher[(0, *at)], student[(0, *at)]) for at in later])
        found = objective.weight * kept + objective.cross_entropy_weight * mean(list(hard.values()))
        if objective.distill_weight:
            new = [at for at in tokens if at not in later]
            told = mean([between(objective.divergence, teacher[(1, *at)], student[(0, *at)]) for at in new])
            found = found + objective.distill_weight * told
        return found
    if isinstance(objective, SharpenedKL):
        values = []
        for at in tokens:
            right = int(teacher[(0, *at)].argmax()) == ids[at]
            p, q = (teacher[(0, *at)] / objective.temperature).log_softmax(0), student[(0, *at)].log_softmax(0)
            values.append(objective.weight * kl(p, q) * right + objective.cross_entropy_weight * hard[at])
        return mean(values)
    if isinstance(objective, StepHalving):
        values = []
        for at in tokens:
            view, share = 0, float(of.p[at])
            while view < objective.teacher_steps - 1 and of.u[at] < share - 1 / objective.sampling_steps:
                view, share = view + 1, share - 1 / objective.sampling_steps
            values.append(between(objective.divergence, teacher[(view, *at)], student[(0, *at)]))
        return mean(values)
    assert isinstance(objective, DiffusionForcing)
    return mean([between(objective.divergence, teacher[(0, *at)], student[(0, *at)]) / of.p[at] for at in tokens])


def tables(of: Noise) -> tuple[Table, Table]:
    """A student of one view, and a teacher of three that is often right."""
    shape = tuple(of.rows.ids.shape)
    student, teacher = Table(1, shape, seed=1), Table(3, shape, seed=2, scale=0.7)
    teacher.hidden = (teacher.hidden + 0.5 * teacher.weight[of.rows.ids]).detach()
    return student, teacher


@every
@pytest.mark.parametrize("seed", [3, 11])
def test_value_and_gradient(objective: DiffusionObjective, kind: str, seed: int) -> None:
    of = noise(kind, seed=seed)
    student, teacher = tables(of)
    found = loss_of(objective, of, student, teacher)
    wanted = by_loops(objective, of, student.logits, teacher.logits.detach())
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    for mine, other in zip(student.gradients(found), student.gradients(wanted), strict=True):
        assert other.any() and torch.allclose(mine, other, rtol=1e-8, atol=1e-12)


@every
def test_micro_batches_add_up(objective: DiffusionObjective, kind: str) -> None:
    of = noise(kind)
    student, teacher = tables(of)
    parts = []
    for row in range(len(of.rows.ids)):
        own = one_row(of, row)
        mine, theirs = (Table(1, (1, 1), seed=0) for _ in range(2))
        mine.hidden, mine.weight = student.hidden[:, row : row + 1], student.weight
        theirs.hidden, theirs.weight = teacher.hidden[:, row : row + 1], teacher.weight
        parts.append(terms(objective, objective.corrupt(own), own.rows.ids, mine, theirs))
    pooled = loss_of(objective, of, student, teacher)
    assert step_loss(objective, parts).item() == pytest.approx(pooled.item(), rel=1e-10)


@every
def test_chunks_change_nothing(objective: DiffusionObjective, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of, kernel = noise(kind), sys.modules["kdlib.kernels.chunked"]
    student, teacher = tables(of)
    whole = loss_of(objective, of, student, teacher)
    monkeypatch.setattr(kernel, "CPU_CHUNK", 3)
    monkeypatch.setattr(kernel, "CPU_BLOCK_BYTES", 2 * V * 8)
    assert loss_of(objective, of, student, teacher).item() == pytest.approx(whole.item(), rel=1e-12)


@every
@pytest.mark.parametrize("lengths", [((4, 0), (2, 0)), ((2, 9), (1, 5))], ids=["none_maskable", "none_masked"])
def test_nothing_to_learn(objective: DiffusionObjective, kind: str, lengths: tuple[tuple[int, int], ...]) -> None:
    of = noise(kind, tokens=rows(lengths))
    of = Noise(**{**vars(of), "u": torch.ones_like(of.u)})
    student, teacher = tables(of)
    found = loss_of(objective, of, student, teacher)
    assert found.item() == 0.0 and all(not g.any() for g in student.gradients(found))


@every
def test_what_the_models_read(objective: DiffusionObjective, kind: str) -> None:
    of = noise(kind)
    corruption = objective.corrupt(of)
    assert len(corruption.student) == 1
    assert torch.equal(corruption.student[0].masked, of.masked() | of.tail)
    for view in corruption.teacher:
        assert torch.equal(view.masked & of.tail, of.tail) and not (view.masked & ~corruption.student[0].masked).any()
    assert objective.accepts is not None and Support.FULL in objective.accepts
    assert objective.weights.keys() >= corruption.scored.keys() or not objective.weights


# Consistency


def test_a_later_state_has_fewer_masks_and_is_the_teachers() -> None:
    of = noise("uniform")
    corruption = MaskConsistency(distill_weight=1.0).corrupt(of)
    later, earlier = (view.masked for view in corruption.teacher)
    assert torch.equal(earlier, corruption.student[0].masked)
    assert torch.equal(later, of.masked(of.v[:, None])) and (earlier & ~later).any() and later.any()
    assert len(MaskConsistency().corrupt(of).teacher) == 1, "the second view is read by the last term alone"


def test_terms_without_weight_are_not_computed() -> None:
    of = noise("uniform")
    assert MaskConsistency(cross_entropy_weight=0.0).corrupt(of).scored.keys() == {"consistency"}
    assert SharpenedKL(cross_entropy_weight=0.0).corrupt(of).scored.keys() == {"distill"}


# Sharpened


def test_a_teacher_that_is_wrong_teaches_nothing_but_the_text() -> None:
    of = noise("response")
    student, teacher = tables(of)
    teacher.hidden = -teacher.weight.detach()[of.rows.ids].expand(3, -1, -1, -1)
    alone = SharpenedKL(cross_entropy_weight=0.0)
    found = loss_of(alone, of, student, teacher)
    assert found.item() == 0.0 and not student.gradients(found)[0].any()
    text = CrossEntropy().on_logits(student.logits[0], labels=of.rows.ids, mask=of.masked())
    assert loss_of(SharpenedKL(), of, student, teacher).item() == pytest.approx((text.sum / text.count).item())


# Step halving


def test_a_token_is_taught_by_the_step_that_unmasks_it() -> None:
    of = noise("uniform", tokens=rows(((0, 40),)), seed=1)
    objective = StepHalving(sampling_steps=8, teacher_steps=3, rounds=1)
    corruption = objective.corrupt(of)
    views, scored = corruption.teacher, corruption.scored["distill"]
    assert isinstance(scored.teacher, Tensor) and views[0].drawn is None
    assert set(scored.teacher[of.masked()].tolist()) == {0, 1, 2}
    for number, view in enumerate(views[1:], start=1):
        assert view.drawn is not None
        assert torch.equal(view.drawn, views[number - 1].masked & ~view.masked) and view.drawn.any()
        gone = of.masked() & (of.u >= of.p - number / 8)
        assert torch.equal(of.masked() & ~view.masked, gone)
    for k in range(3):
        chosen = of.masked() & (scored.teacher == k)
        assert (views[k].masked & chosen).equal(chosen), "a token is unknown to the view that teaches it"


def test_rounds_double_the_step() -> None:
    objective = StepHalving(refresh_steps=10)
    state = objective.init_state(100)
    assert objective.bind(state) == objective.bind({}) == objective
    assert [step for step in range(1, 101) if objective.refreshes(step)] == [10, 20, 30, 40, 50, 60]
    taken = []
    for step in range(1, 101):
        if step % 10 == 1:
            taken.append(objective.bind(state).sampling_steps)
        state = objective.update(state, 1.0, step)
    assert taken == [1024, 512, 256, 128, 64, 32, 16, 16, 16, 16]


# Forcing


def test_forcing_asks_for_a_student_that_reads_blocks() -> None:
    assert DiffusionForcing().student_attention == "block_causal" and SharpenedKL().student_attention is None


def test_forcing_has_the_gradient_of_the_soft_cross_entropy() -> None:
    of = noise("monotone")
    student, teacher = tables(of)
    found = loss_of(DiffusionForcing(), of, student, teacher)
    mask = of.masked()
    soft = torch.nn.functional.cross_entropy(
        student.logits[0][mask], teacher.logits[0][mask].detach().softmax(-1), reduction="none"
    )
    for mine, other in zip(student.gradients(found), student.gradients((soft / of.p[mask]).mean()), strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (MaskConsistency, {"divergence": CrossEntropy()}, "divergence cannot be CrossEntropy"),
        (StepHalving, {"divergence": TAID()}, "divergence cannot be TAID"),
        (DiffusionForcing, {"divergence": SampledReverseKL()}, "divergence cannot be SampledReverseKL"),
        (MaskConsistency, {"share_range": (0.6, 0.5)}, "share_range needs"),
        (MaskConsistency, {"weight": 0.0, "cross_entropy_weight": 0.0}, "one of them above 0"),
        (SharpenedKL, {"temperature": 1.5}, "temperature must be above 0 and at most 1"),
        (SharpenedKL, {"weight": 0.0}, "weight > 0"),
        (StepHalving, {"teacher_steps": 1}, "teacher_steps >= 2"),
        (StepHalving, {"sampling_steps": 64}, "7 rounds of 2 steps in one leave less than a step of 64"),
    ],
    ids=lambda x: x if isinstance(x, str) else getattr(x, "__name__", "options"),
)
def test_options_out_of_range(cls: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(**options)

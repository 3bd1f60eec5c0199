"""MaskedELBO against loops over tokens, and as the bound that it states."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kdlib.diffusion import Noise, Rows
from kdlib.diffusion.masking import Draws, Masking
from kdlib.objectives import CrossEntropy, MaskedELBO
from kdlib.types import Head, Positions, StudentSignal
from tests.objectives.diffusion_cases import Table, loss_of, noise, one_row, rows, step_loss, terms

EVERY = [MaskedELBO(weighting=w, normalize=n) for w in ("elbo", "uniform", "cart") for n in ("token", "sequence")]
every_way = pytest.mark.parametrize("objective", EVERY, ids=lambda o: f"{o.weighting}-{o.normalize}")
every_kind = pytest.mark.parametrize("kind", ["uniform", "blocks", "per_block", "trajectory"])


def by_loops(objective: MaskedELBO, of: Noise, logits: Tensor) -> Tensor:
    """The formula, token by token; ``logits`` [B, S, V]."""
    B, S = of.rows.ids.shape
    logp = logits.log_softmax(-1)
    sums, sizes = [], []
    for b in range(B):
        total, size = logits.new_zeros(()), 0
        for i in range(S):
            hidden = bool(of.segment[b, i]) and float(of.u[b, i]) < float(of.p[b, i])
            size += hidden if objective.weighting == "uniform" else bool(of.segment[b, i])
            if not hidden:
                continue
            weight = {"elbo": 1 / float(of.p[b, i]), "uniform": 1.0, "cart": near(of, b, i)}[objective.weighting]
            total = total - weight * logp[b, i, of.rows.ids[b, i]]
        sums.append(total)
        sizes.append(size)
    if objective.normalize == "token":
        return torch.stack(sums).sum() / max(1, sum(sizes))
    return torch.stack([s / n for s, n in zip(sums, sizes, strict=True) if n]).sum() / max(1, sum(n > 0 for n in sizes))


def near(of: Noise, b: int, i: int) -> float:
    assert of.rows.visible is not None
    found = 0.0
    for j in range(of.rows.ids.shape[1]):
        hidden = bool(of.tail[b, j]) or (bool(of.segment[b, j]) and float(of.u[b, j]) < float(of.p[b, j]))
        if j != i and not hidden and bool(of.rows.visible[b, j]):
            found += 0.5 * 0.3 * 0.7 ** (abs(i - j) - 1)
    return found


@every_kind
@every_way
def test_value_and_gradient(objective: MaskedELBO, kind: str) -> None:
    of = noise(kind)
    student = Table(1, tuple(of.rows.ids.shape), seed=1)
    found, wanted = loss_of(objective, of, student), by_loops(objective, of, student.logits[0])
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)
    for mine, other in zip(student.gradients(found), student.gradients(wanted), strict=True):
        assert torch.allclose(mine, other, rtol=1e-9, atol=1e-12)


@every_way
def test_micro_batches_add_up(objective: MaskedELBO) -> None:
    of = noise("uniform")
    student = Table(1, tuple(of.rows.ids.shape), seed=1)
    parts = []
    for row in range(len(of.rows.ids)):
        own = one_row(of, row)
        part = Table(1, tuple(own.rows.ids.shape), seed=0)
        part.hidden, part.weight = student.hidden[:, row : row + 1], student.weight
        parts.append(terms(objective, objective.corrupt(own), own.rows.ids, part))
    pooled = loss_of(objective, of, student)
    assert step_loss(objective, parts).item() == pytest.approx(pooled.item(), rel=1e-10)


@every_way
def test_padding_changes_nothing(objective: MaskedELBO) -> None:
    of = one_row(noise("uniform", tokens=rows(((2, 6), (9, 4)))), 0)
    kept = {name: x[:, :8] if x.ndim == 2 else x for name, x in vars(of.rows).items() if x is not None}
    cut = {name: x[:, :8] if x.ndim == 2 else x for name, x in vars(of).items() if name != "rows"}
    assert of.rows.ids.shape == (1, 13)
    student = Table(1, (1, 13), seed=1)
    part = Table(1, (1, 8), seed=1)
    part.hidden, part.weight = student.hidden[:, :, :8], student.weight
    short = Noise(rows=Rows(**kept), **cut)
    assert loss_of(objective, short, part).item() == pytest.approx(loss_of(objective, of, student).item(), rel=1e-12)


@every_way
def test_nothing_masked_and_nothing_maskable(objective: MaskedELBO) -> None:
    of = noise("uniform")
    empty = Noise(**{**vars(of), "u": torch.ones_like(of.u)})
    none = noise("blocks", tokens=rows(((4, 0), (3, 0))))
    for found in (empty, none):
        student = Table(1, tuple(found.rows.ids.shape), seed=1)
        loss = loss_of(objective, found, student)
        assert loss.item() == 0.0 and all(not g.any() for g in student.gradients(loss))


def copies(length: int, number: int) -> Noise:
    """Noise of many rows of the tokens 0, 1, ..."""
    tokens = Rows(
        ids=torch.arange(length).repeat(number, 1),
        maskable=torch.ones(number, length, dtype=torch.bool),
        rank=torch.arange(length).repeat(number, 1),
        length=torch.full((number,), length),
    )
    generator = torch.Generator().manual_seed(0)
    row, block, token = (torch.rand(number, n, generator=generator, dtype=torch.float64) for n in (3, length, length))
    return Masking().noise(tokens, Draws(row=row, block=block, token=token), progress=0.0)


JOINT = np.array([[0.55, 0.05], [0.1, 0.3]])  # of two tokens; (0, 1) is the text
ALONE = np.log(JOINT.sum(1)), np.log(JOINT.sum(0))
KNOWING = np.log(JOINT[:, 1] / JOINT[:, 1].sum()), np.log(JOINT[0] / JOINT[0].sum())


@pytest.mark.parametrize("knows", [(True, True), (True, False)], ids=["both", "first"])
def test_the_mean_over_masks_bounds_the_negative_log_likelihood(knows: tuple[bool, bool]) -> None:
    """With the joint distribution's conditionals it is -log p(text); where a token ignores the other, the mean over orders."""
    of = copies(2, 40_000)
    masked, scored = of.masked(), MaskedELBO().corrupt(of).scored["cross_entropy"]
    given = [torch.tensor(KNOWING[i] if knows[i] else ALONE[i]) for i in range(2)]
    logp = torch.stack([torch.where(masked[:, 1 - i, None], torch.tensor(ALONE[i]), given[i]) for i in range(2)], 1)
    row, column = scored.where.nonzero(as_tuple=True)
    assert scored.weight is not None and scored.total == 80_000
    positions = Positions(index=column, labels=column, sequence=row, weight=scored.weight[row, column])
    signal = StudentSignal(hidden=logp[row, column], head=Head(weight=torch.eye(2).double()), positions=positions)
    found = MaskedELBO().terms({"cross_entropy": signal}, {})["cross_entropy"].sum.item() / scored.total * 2
    orders = [ALONE[i][i] + float(given[1 - i][1 - i]) for i in range(2)]  # log p when token i comes first
    weighted = -logp[row, column].gather(1, column[:, None])[:, 0] * scored.weight[row, column]
    each = torch.zeros(len(masked), dtype=torch.float64).index_add(0, row, weighted)
    assert abs(found + np.mean(orders)) < 4 * each.std().item() / math.sqrt(len(masked))
    likelihood = np.log(np.mean(np.exp(orders)))
    assert -np.mean(orders) >= -likelihood - 1e-12
    assert (-np.mean(orders) > -likelihood + 0.01) == (knows == (True, False))
    assert knows != (True, True) or likelihood == pytest.approx(np.log(JOINT[0, 1]))


def test_uniform_is_plain_cross_entropy_of_the_masked_tokens() -> None:
    of = noise("response")
    student = Table(1, tuple(of.rows.ids.shape), seed=2)
    plain = CrossEntropy().on_logits(student.logits[0], labels=of.rows.ids, mask=of.masked())
    found = loss_of(MaskedELBO(weighting="uniform"), of, student)
    assert found.item() == pytest.approx((plain.sum / plain.count).item(), rel=1e-12)


def test_the_view_masks_segment_and_tail() -> None:
    of = noise("blocks", block_length=3)
    corruption = MaskedELBO().corrupt(of)
    assert of.tail.any() and torch.equal(corruption.student[0].masked, of.masked() | of.tail) and corruption.teacher == ()


@pytest.mark.parametrize("options", [{"weighting": "linear"}, {"normalize": "batch"}], ids=["weighting", "normalize"])
def test_options_that_are_none(options: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"MaskedELBO\.\w+ '\w+': choose"):
        MaskedELBO(**options)  # type: ignore[arg-type]

"""CertaintyForcing against dParallel's formulas, executed in numpy, and its gradients position by position."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdlib.diffusion import Noise
from kdlib.objectives import CertaintyForcing
from tests.objectives.diffusion_cases import Table, V, loss_of, noise, one_row, rows, step_loss, student_signal, terms

Array = NDArray[np.float64]
OBJECTIVES = {
    "dparallel": CertaintyForcing(),
    "dream": CertaintyForcing(weight=1.0, temperature=1.5),
    "one_view": CertaintyForcing(complementary=False),
    "d3llm": CertaintyForcing(scale=0.25, certainty_on="first"),
    "cross_entropy": CertaintyForcing(weight=0.0),
}
every = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def softmax(z: Array) -> Array:
    weights = np.exp(z - z.max())
    return np.asarray(weights / weights.sum())


def published(z: Array, x0: NDArray[np.int64], mask: NDArray[np.bool_], *, T: float = 0.5) -> tuple[float, float, Array, Array]:
    """(CE, Hc) of one view, z [L, V], and their gradients, by loops: the reference's own formulas with its 1e-12."""
    of_ce, of_h = np.zeros_like(z), np.zeros_like(z)
    masked = [i for i in range(len(z)) if mask[i]]
    right = [i for i in masked if int(np.argmax(z[i])) == x0[i]]
    ce = h = 0.0
    for i in masked:
        p = softmax(z[i])
        ce -= float(np.log(p[x0[i]])) / len(masked)
        of_ce[i] = (p - np.eye(z.shape[1])[x0[i]]) / len(masked)
    for i in right:
        p = softmax(z[i] / T)
        own = float(-(p * np.log(p + 1e-12)).sum())
        h += own / len(right)
        of_h[i] = -p * (np.log(p) + own) / T / len(right)
    return ce, h, of_ce, of_h


def sharp(shape: tuple[int, ...], ids: Tensor, *, seed: int, right: float = 0.6) -> Tensor:
    """Logits [..., V] that predict about ``right`` of the ids."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(*shape, V, generator=generator, dtype=torch.float64)
    known = torch.rand(shape, generator=generator) < right
    return z + 3.0 * torch.nn.functional.one_hot(ids, V) * known[..., None]


def table(views: int, of: Noise, *, seed: int = 1, right: float = 0.6) -> Table:
    """A model whose logits are its hidden states."""
    found = Table(views, (1, 1), seed=0)
    ids = of.rows.ids.expand(views, *of.rows.ids.shape)
    found.hidden = sharp(tuple(ids.shape), ids, seed=seed, right=right).requires_grad_()
    found.weight = torch.eye(V, dtype=torch.float64).requires_grad_()
    return found


@pytest.mark.parametrize("seed", range(6))
def test_it_is_dparallel_on_one_row(seed: int) -> None:
    """The whole step: block k, a Bernoulli mask in it and its complement, MASK behind it; CE + CE' + beta (H + H')."""
    prompt, r, block = 3, 10, 4
    of = noise("blocks", tokens=rows(((prompt, r),), seed=seed), seed=seed)
    first = int(of.segment[0].nonzero()[0])
    k, L = (first - prompt) // block, prompt + r
    start, end = prompt + k * block, (L if k == r // block else prompt + (k + 1) * block)
    seg = (of.u < 0.999 * 0.5 + 0.001)[0, start:end].numpy()
    masks = np.zeros((2, L), dtype=bool)
    masks[0, start:end], masks[1, start:end] = seg, ~seg
    corruption = CertaintyForcing().corrupt(of)
    for view, mask in zip(corruption.student, masks, strict=True):
        shown = mask.copy()
        shown[end:] = True
        assert view.masked[0].tolist() == shown.tolist()
    student = table(2, of, seed=seed)
    parts = [published(z, of.rows.ids[0].numpy(), m) for z, m in zip(student.hidden[:, 0].detach().numpy(), masks, strict=True)]
    for beta in (2.0, 1.0):
        found = loss_of(CertaintyForcing(weight=beta), of, student)
        assert found.item() == pytest.approx(sum(ce + beta * h for ce, h, _, _ in parts), abs=1e-6)
        gradient = np.stack([a + beta * b for _, _, a, b in parts])
        assert np.allclose(student.gradients(found)[0][:, 0].numpy(), gradient, atol=1e-6)
    d3llm = loss_of(CertaintyForcing(scale=0.25, certainty_on="first"), of, student)
    assert d3llm.item() == pytest.approx((parts[0][0] + parts[1][0] + 2.0 * parts[0][1]) / 4, abs=1e-6)


@every
@pytest.mark.parametrize("kind", ["blocks", "response", "trajectory"])
def test_a_batch_is_its_masked_tokens_together(objective: CertaintyForcing, kind: str) -> None:
    of = noise(kind)
    student = table(2, of)
    wanted = 0.0
    for view, mask in enumerate((of.masked(), of.complement)):
        z, x0 = student.hidden[view].detach().reshape(-1, V).numpy(), of.rows.ids.flatten().numpy()
        ce, h, _, _ = published(z, x0, mask.flatten().numpy(), T=objective.temperature)
        if view == 0 or objective.complementary:
            wanted += ce
            wanted += objective.weight * h * (view == 0 or objective.certainty_on == "both")
    found = loss_of(objective, of, student)
    assert found.item() == pytest.approx(objective.scale * wanted, abs=1e-9)
    assert len(objective.corrupt(of).student) == (2 if objective.complementary else 1)


def test_micro_batches_cross_entropy_pools_and_certainty_is_a_mean_of_means() -> None:
    of, objective = noise("response"), CertaintyForcing()
    student, parts, means = table(2, of), [], []
    for row in range(len(of.rows.ids)):
        own, part = one_row(of, row), table(2, one_row(of, row))
        part.hidden, part.weight = student.hidden[:, row : row + 1], student.weight
        parts.append(terms(objective, objective.corrupt(own), own.rows.ids, part))
        z, x0 = part.hidden[0, 0].detach().numpy(), own.rows.ids[0].numpy()
        means.append((int(own.masked().sum()), published(z, x0, own.masked()[0].numpy())[1]))
    pooled = terms(objective, objective.corrupt(of), of.rows.ids, student)
    for name in ("cross_entropy", "cross_entropy_complement"):
        assert sum(part[name].sum.item() for part in parts) == pytest.approx(pooled[name].sum.item(), rel=1e-12)
        assert sum(part[name].count for part in parts) == pooled[name].count
    found = sum(part["certainty"].sum.item() for part in parts) / sum(part["certainty"].count for part in parts)
    assert found == pytest.approx(sum(n * h for n, h in means) / sum(n for n, _ in means), rel=1e-9)
    assert step_loss(objective, parts).isfinite()


def test_certainty_pulls_on_right_masked_tokens_alone() -> None:
    of = noise("response")
    student = table(2, of)
    found = terms(CertaintyForcing(), CertaintyForcing().corrupt(of), of.rows.ids, student)
    gradient = student.gradients(found["certainty"].sum)[0]
    right = of.masked() & (student.hidden[0].argmax(-1) == of.rows.ids)
    assert right.any() and (of.masked() & ~right).any()
    assert torch.equal(gradient[0].ne(0).any(-1), right) and not gradient[1].any()
    accuracy, masked = found["certainty"].metrics["masked_accuracy"]
    assert (int(accuracy), masked) == (int(right.sum()), int(of.masked().sum()))
    total, number = found["certainty"].metrics["entropy_of_right"]
    assert number == int(right.sum()) and not total.requires_grad


def test_the_temperature_is_in_the_entropy_alone() -> None:
    of = noise("response")
    student = table(2, of)
    cold, hot = (
        terms(CertaintyForcing(temperature=t), CertaintyForcing().corrupt(of), of.rows.ids, student) for t in (0.25, 2.0)
    )
    assert cold["cross_entropy"].sum.item() == hot["cross_entropy"].sum.item()
    assert cold["certainty"].metrics["masked_accuracy"] == hot["certainty"].metrics["masked_accuracy"]
    assert cold["certainty"].sum < hot["certainty"].sum


@every
@pytest.mark.parametrize("case", ["none_right", "none_masked", "none_maskable"])
def test_finite_where_there_is_nothing(objective: CertaintyForcing, case: str) -> None:
    of = noise("blocks", tokens=rows(((4, 0), (2, 0)))) if case == "none_maskable" else noise("blocks")
    if case == "none_masked":
        of = Noise(**{**vars(of), "u": torch.ones_like(of.u)})
    student = table(2, of)
    if case == "none_right":
        wrong = torch.nn.functional.one_hot((of.rows.ids + 1) % V, V).double()
        student.hidden = (9.0 * wrong).expand(2, *wrong.shape).clone().requires_grad_()
    found = loss_of(objective, of, student)
    assert found.isfinite() and found.requires_grad
    assert all(g.isfinite().all() for g in student.gradients(found))
    if case == "none_maskable":
        assert found.item() == 0.0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    of, kernel = noise("response"), sys.modules["kdlib.kernels.chunked"]
    student = Table(2, tuple(of.rows.ids.shape), seed=4)
    whole = loss_of(CertaintyForcing(), of, student)
    monkeypatch.setattr(kernel, "CPU_CHUNK", 3)
    monkeypatch.setattr(kernel, "CPU_BLOCK_BYTES", 2 * V * 8)
    parts = loss_of(CertaintyForcing(), of, student)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-12)
    for mine, other in zip(student.gradients(parts), student.gradients(whole), strict=True):
        assert torch.allclose(mine, other, rtol=1e-10, atol=1e-14)


def test_a_head_that_is_trained_gets_both_terms_gradients() -> None:
    of = noise("response")
    student = Table(2, tuple(of.rows.ids.shape), seed=4)
    student.hidden = (student.hidden + student.weight[of.rows.ids]).detach().requires_grad_()  # so that some are right
    found = loss_of(CertaintyForcing(), of, student)
    logits, wanted = student.logits, torch.zeros((), dtype=torch.float64)
    for view, mask in enumerate((of.masked(), of.complement)):
        z, x0 = logits[view][mask], of.rows.ids[mask]
        wanted = wanted + torch.nn.functional.cross_entropy(z, x0)
        sure = torch.distributions.Categorical(logits=z[z.argmax(-1) == x0] / 0.5).entropy()
        assert len(sure), "the case has no token that is right"
        wanted = wanted + 2.0 * sure.mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)
    for mine, other in zip(student.gradients(found), student.gradients(wanted), strict=True):
        assert other.any() and torch.allclose(mine, other, rtol=1e-9, atol=1e-12)


# On logits


@pytest.mark.parametrize("weight", [2.0, 1.0, 0.0])
def test_one_view_on_logits(weight: float) -> None:
    of = noise("response")
    z = sharp(tuple(of.rows.ids.shape), of.rows.ids, seed=2).requires_grad_()
    loss = CertaintyForcing(weight=weight).on_logits(z, labels=of.rows.ids, mask=of.masked())
    ce, h, of_ce, of_h = published(
        z.detach().reshape(-1, V).numpy(), of.rows.ids.flatten().numpy(), of.masked().flatten().numpy()
    )
    assert loss.count == int(of.masked().sum())
    assert (loss.sum / loss.count).item() == pytest.approx(ce + weight * h, abs=1e-9)
    gradient = torch.autograd.grad(loss.sum / loss.count, z)[0].reshape(-1, V).numpy()
    assert np.allclose(gradient, of_ce + weight * of_h, atol=1e-9)
    assert CertaintyForcing(weight=weight).on_logits(z, labels=torch.where(of.masked(), of.rows.ids, -100)).sum == loss.sum


def test_on_logits_with_nothing_to_score() -> None:
    z = torch.randn(2, 3, V, requires_grad=True)
    loss = CertaintyForcing().on_logits(z, labels=torch.zeros(2, 3).long(), mask=torch.zeros(2, 3).bool())
    assert loss.sum.item() == 0.0 and loss.count == 0 and not torch.autograd.grad(loss.sum, z)[0].any()
    with pytest.raises(ValueError, match="labels covers positions"):
        CertaintyForcing().on_logits(z, labels=torch.zeros(2, 2).long())


def test_huge_logits_have_no_nan() -> None:
    ids = torch.tensor([[1, 2, 3]])
    for scale in (300.0, torch.inf):
        z = torch.where(torch.nn.functional.one_hot(ids, V).bool(), 0.0, -scale).requires_grad_()
        loss = CertaintyForcing().on_logits(z, labels=ids)
        assert loss.sum.item() == 0.0 and torch.autograd.grad(loss.sum, z)[0].isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": -1.0}, "weight >= 0"),
        ({"scale": 0.0}, "scale > 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"certainty_on": "second"}, "certainty_on must be both or first"),
    ],
    ids=["weight", "scale", "temperature", "certainty_on"],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CertaintyForcing(**options)  # type: ignore[arg-type]


def test_it_is_not_for_one_signal() -> None:
    of = noise("response")
    signal = student_signal(table(2, of), CertaintyForcing().corrupt(of).scored["cross_entropy"], of.rows.ids)
    with pytest.raises(ValueError, match="train with kdlib diffusion"):
        CertaintyForcing()(signal, None)

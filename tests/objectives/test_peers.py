"""Against TRL and Liger where they define the same thing: the generalised Jensen-Shannon divergence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kdlib.kernels import linear_objective
from kdlib.objectives import CrossEntropy, GeneralizedJSD, RowObjective, Sum
from kdlib.types import Head, Positions, StudentSignal, TeacherSignal

BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
N, V, D, DT = 24, 50, 8, 12

betas = pytest.mark.parametrize("beta", BETAS)
temperatures = pytest.mark.parametrize("temperature", [1.0, 2.0])


@betas
@temperatures
def test_trl_generalized_jsd_loss(beta: float, temperature: float) -> None:
    gkd = pytest.importorskip("trl.experimental.gkd", reason="trl is not installed")
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 5, V, generator=generator, dtype=torch.float64).expand(2, 2, 5, V).clone()
    teacher = torch.randn(2, 5, V, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, V, (2, 5), generator=generator)
    labels[0, :2] = -100
    ours.requires_grad_(), theirs.requires_grad_()
    found = GeneralizedJSD(beta=beta, temperature=temperature).on_logits(ours, teacher, labels=labels)
    wanted = gkd.GKDTrainer.generalized_jsd_loss(
        theirs, teacher, labels=labels, beta=beta, temperature=temperature, reduction="sum"
    )
    found.sum.backward(), wanted.backward()
    assert found.count == 8
    torch.testing.assert_close(found.sum, wanted)
    torch.testing.assert_close(ours.grad, theirs.grad)


def linear(*, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (N, D), "weight": (V, D), "teacher_hidden": (N, DT), "teacher_weight": (V, DT)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def ours(objective: RowObjective, at: dict[str, Tensor], labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    rows = torch.arange(N)
    hidden, weight = (at[name].clone().requires_grad_() for name in ("hidden", "weight"))
    loss = linear_objective(
        StudentSignal(
            hidden=hidden,
            head=Head(weight=weight),
            positions=Positions(index=rows, labels=labels, sequence=torch.zeros_like(rows)),
        ),
        TeacherSignal(hidden=at["teacher_hidden"], head=Head(weight=at["teacher_weight"])),
        objective,
    )
    mean = loss.sum / loss.count
    return mean.detach(), torch.autograd.grad(mean, (hidden, weight))


@betas
@temperatures
@pytest.mark.parametrize("hard", [0.0, 0.4])
def test_liger_chunked_linear_jsd(beta: float, temperature: float, hard: float) -> None:
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    at, labels = linear(), torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(2))
    jsd = GeneralizedJSD(beta=beta, temperature=temperature)
    found, gradients = ours(Sum(parts=((1.0 - hard, jsd), (hard, CrossEntropy()))), at, labels)
    peer = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=hard,
        weight_soft_loss=1.0 - hard,
        beta=beta,
        temperature=temperature,
        compiled=False,
        chunk_size=7,
    )
    hidden, weight = (at[name].clone().requires_grad_() for name in ("hidden", "weight"))
    wanted = peer(hidden, weight, at["teacher_hidden"], at["teacher_weight"], labels)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-5, atol=1e-6)
    for mine, theirs in zip(gradients, torch.autograd.grad(wanted, (hidden, weight)), strict=True):
        assert (mine - theirs).norm() <= 1e-5 * theirs.norm()

"""What ``benchmarks/loss.py`` compares: ways of computing the mean divergence of N rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from torch import Tensor
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

from kdlib.kernels import linear_objective
from kdlib.kernels.chunked import chunk_rows
from kdlib.objectives import ForwardKL, GeneralizedJSD
from kdlib.types import Head, Positions, StudentSignal, TeacherSignal

BETAS = {"ForwardKL": 0.0, "GeneralizedJSD(0.5)": 0.5}  # TRL's and Liger's beta


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Hidden states [N, D_s], [N, D_t] and head weights [V, D_s], [V, D_t]; the student's want gradients."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor

    @staticmethod
    def drawn(*, rows: int, vocab: int, widths: tuple[int, int], device: str, seed: int) -> Inputs:
        """Standard normal hidden states; weights that give logits a standard deviation of 1.5."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(n: int, width: int, std: float) -> Tensor:
            return torch.empty(n, width, device=device).normal_(0.0, std, generator=generator)

        student, teacher = widths
        return Inputs(
            hidden=normal(rows, student, 1.0).requires_grad_(),
            weight=normal(vocab, student, 1.5 / math.sqrt(student)).requires_grad_(),
            teacher_hidden=normal(rows, teacher, 1.0),
            teacher_weight=normal(vocab, teacher, 1.5 / math.sqrt(teacher)),
        )

    def double(self) -> Inputs:
        """The same numbers in float64."""
        return Inputs(
            hidden=self.hidden.detach().double().requires_grad_(),
            weight=self.weight.detach().double().requires_grad_(),
            teacher_hidden=self.teacher_hidden.double(),
            teacher_weight=self.teacher_weight.double(),
        )

    @property
    def chunk(self) -> int:
        """c: the rows that kdlib projects at a time."""
        return min(len(self.hidden), chunk_rows(self.hidden, Head(weight=self.weight)))


def kdlib_chunked(x: Inputs, beta: float) -> Tensor:
    rows = torch.arange(len(x.hidden), device=x.hidden.device)
    positions = Positions(index=rows, labels=torch.zeros_like(rows), sequence=torch.zeros_like(rows))
    student = StudentSignal(hidden=x.hidden, head=Head(weight=x.weight), positions=positions)
    teacher = TeacherSignal(hidden=x.teacher_hidden, head=Head(weight=x.teacher_weight))
    objective = ForwardKL() if beta == 0.0 else GeneralizedJSD(beta=beta)
    return linear_objective(student, teacher, objective, impl="chunked").sum / len(rows)


def naive(x: Inputs, beta: float) -> Tensor:
    """All logits at once, ``log_softmax`` and ``kl_div``, plain autograd: what the textbook says."""
    logq = F.log_softmax(x.hidden @ x.weight.T, dim=-1)
    logp = F.log_softmax(x.teacher_hidden @ x.teacher_weight.T, dim=-1)
    if beta == 0.0:
        return F.kl_div(logq, logp, reduction="batchmean", log_target=True)
    logm = torch.logaddexp(logp + math.log(beta), logq + math.log1p(-beta))
    of_p, of_q = (F.kl_div(logm, side, reduction="batchmean", log_target=True) for side in (logp, logq))
    return beta * of_p + (1.0 - beta) * of_q


def trl(x: Inputs, beta: float) -> Tensor:
    heads = (x.hidden, x.weight, None, x.teacher_hidden, x.teacher_weight, None)
    return ChunkedDivergenceFunction.apply(*heads, beta)[0].mean()


def liger(x: Inputs, beta: float, *, chunk_size: int) -> Tensor:
    compiled = x.hidden.is_cuda  # compilation on CPU needs a C++ compiler and is not what users of CPUs get
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled, chunk_size=chunk_size
    )
    labels = torch.zeros(len(x.hidden), dtype=torch.long, device=x.hidden.device)
    return loss(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, labels)


METHODS: dict[str, Callable[[Inputs, float], Tensor]] = {
    "kdlib chunked": kdlib_chunked,
    "naive": naive,
    "TRL": trl,
    "Liger": lambda x, beta: liger(x, beta, chunk_size=1024),  # its default
    "Liger, same chunk": lambda x, beta: liger(x, beta, chunk_size=x.chunk),
}


def gradients(method: str, x: Inputs, objective: str) -> tuple[Tensor, Tensor]:
    """Forward and backward; the gradients of the student's hidden states and weight."""
    METHODS[method](x, BETAS[objective]).backward()
    found = x.hidden.grad, x.weight.grad
    x.hidden.grad = x.weight.grad = None
    assert found[0] is not None and found[1] is not None
    return found[0], found[1]


class MatrixProducts:
    """The floor: the four products no method can do without, in chunks of c rows and prepared buffers."""

    def __init__(self, x: Inputs) -> None:
        self.x = x
        self.logits = torch.zeros(x.chunk, len(x.weight), device=x.hidden.device)
        self.grad_hidden, self.grad_weight = torch.zeros_like(x.hidden), torch.zeros_like(x.weight)
        self.flops = 2 * len(x.hidden) * len(x.weight) * (3 * x.hidden.shape[1] + x.teacher_hidden.shape[1])

    @torch.no_grad()
    def __call__(self) -> None:
        x, c = self.x, self.x.chunk
        for start in range(0, len(x.hidden), c):
            rows = slice(start, start + c)
            logits = self.logits[: len(x.hidden[rows])]
            torch.mm(x.teacher_hidden[rows], x.teacher_weight.T, out=logits)
            torch.mm(x.hidden[rows], x.weight.T, out=logits)
            torch.mm(logits, x.weight, out=self.grad_hidden[rows])
            self.grad_weight.addmm_(logits.T, x.hidden[rows])


def gradient_error(method: str, objective: str, *, device: str, seed: int) -> float:
    """Relative (Frobenius) error of the worse float32 gradient against float64 autograd, at a small size."""
    x = Inputs.drawn(rows=300, vocab=512, widths=(32, 48), device=device, seed=seed)
    exact = gradients("naive", x.double(), objective)
    found = gradients(method, x, objective)
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))

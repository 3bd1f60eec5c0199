"""Teachers whose answers are known beforehand, and models as teachers over made-up rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdlib.data import DistillationCollator, causal_positions
from kdlib.types import Head, Loss, Positions, RowObjective, StudentSignal, Support, TeacherSignal

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9], "sample_id": 11},
    {"input_ids": [10, 11, 12], "labels": [-100, 11, 12], "sample_id": 12},
    {"input_ids": [13, 14, 15, 16], "labels": [-100, 14, -100, 16], "sample_id": 13},
    {"input_ids": [7, 9, 17, 18, 19, 20], "labels": [-100, -100, -100, -100, 19, 20], "sample_id": 14},
]


def collated(rows: list[dict[str, Any]], **options: Any) -> tuple[dict[str, Any], Positions]:
    batch = DistillationCollator(0, **options)(rows)
    return batch, causal_positions(batch)


class Fixed:
    """Gives the signal it was made with, cut to the positions asked for; remembers the sample ids of the lines it saw."""

    def __init__(self, signal: TeacherSignal) -> None:
        self.made, self.provides = signal, signal.support
        self.seen: list[list[int]] = []

    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        self.seen.append(batch["input_ids"].tolist())
        return self.made


class Lookup:
    """Truncated log-probs from a table by the token at the position [V, V]: the answer shows which position was asked."""

    def __init__(self, table: Tensor, *, k: int = 3, support: Support = Support.TOPK, temperature: float = 1.0) -> None:
        self.table, self.k, self.provides, self.temperature = table, k, support, temperature

    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        token = batch["input_ids"].flatten()[positions.index]
        logp = self.table[token].log_softmax(-1)
        if self.provides is not Support.TOPK:
            ids = positions.labels[:, None]
            return TeacherSignal(logp=logp.gather(-1, ids), ids=ids, support=self.provides, temperature=self.temperature)
        top, ids = logp.sort(dim=-1, descending=True)
        rest = top[:, self.k :].logsumexp(-1)
        return TeacherSignal(
            logp=top[:, : self.k], ids=ids[:, : self.k], rest=rest, support=self.provides, temperature=self.temperature
        )


def student(positions: Positions, *, vocab: int, seed: int = 3, dtype: torch.dtype = torch.float64) -> StudentSignal:
    """Random hidden states and a random head, both asking for gradients."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (torch.randn(*shape, generator=generator, dtype=dtype) for shape in ((len(positions), 6), (vocab, 6)))
    return StudentSignal(hidden=hidden.requires_grad_(), head=Head(weight=weight.requires_grad_()), positions=positions)


def positions(n: int, *, vocab: int) -> Positions:
    rows = torch.arange(n)
    return Positions(index=rows, labels=rows % vocab, sequence=torch.zeros_like(rows), drawn=torch.full((n,), -1.0))


def graded(objective: RowObjective, signal: TeacherSignal, *, impl: str, n: int, vocab: int) -> tuple[Loss, list[Tensor]]:
    """Loss with metrics, and its gradients with respect to hidden states and head."""
    from kdlib.kernels import linear_objective

    own = student(positions(n, vocab=vocab), vocab=vocab)
    loss = linear_objective(own, signal, objective, impl=impl, metrics=True)  # type: ignore[arg-type]
    return loss, list(torch.autograd.grad(loss.sum, [own.hidden, own.head.weight]))

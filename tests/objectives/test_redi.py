"""REDI against sums over single tokens of single answers, in float64; its gradient; what may not matter."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kdlib.objectives import REDI
from kdlib.types import Head, Positions, StudentSignal
from tests.objectives import oracle

D, V = 5, 11
# (pair, whether it is the right answer, how many tokens): pairs of unequal lengths, and pair 2 without a wrong answer
ANSWERS = ((0, True, 3), (0, False, 5), (1, True, 4), (1, False, 1), (2, True, 2))
TOKENS = sum(length for *_, length in ANSWERS)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def signal(hidden: Tensor, weight: Tensor) -> StudentSignal:
    sequence = [2 * pair + (not right) for pair, right, length in ANSWERS for _ in range(length)]
    labels = torch.arange(TOKENS) * 7 % V
    positions = Positions(index=torch.arange(TOKENS), labels=labels, sequence=torch.tensor(sequence))
    return StudentSignal(hidden=hidden, head=Head(weight=weight), positions=positions)


def expected(hidden: Tensor, weight: Tensor, *, positive: float, alpha: float) -> float:
    """The sum over pairs, one token after another."""
    logits, total, token = (hidden @ weight.T).tolist(), 0.0, 0
    for _, right, length in ANSWERS:
        logp = [math.log(oracle.softmax(logits[t])[t * 7 % V]) for t in range(token, token + length)]
        total += (-positive if right else alpha) * sum(logp) / length
        token += length
    return total


@pytest.mark.parametrize(("positive", "alpha"), [(1.0, 0.8), (0.5, 1.0), (1.0, 0.0), (0.0, 0.3)])
def test_equals_the_sum_over_pairs(positive: float, alpha: float) -> None:
    hidden, weight = drawn(TOKENS, D, seed=0), drawn(V, D, seed=1)
    loss = REDI(positive_weight=positive, alpha=alpha)(signal(hidden, weight), None)
    assert loss.sum.item() == pytest.approx(expected(hidden, weight, positive=positive, alpha=alpha), rel=1e-12)
    assert loss.count == 3, "pairs, the one without a wrong answer included"


class Again(torch.autograd.Function):
    """The loss once more in backward: gradcheck goes backward twice, which the single-pass kernel does not do."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return REDI()(signal(hidden, weight), None).sum

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Any:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            loss = REDI()(signal(*inputs), None).sum
        return torch.autograd.grad(loss, inputs, upstream)


def test_gradient() -> None:
    hidden, weight = drawn(TOKENS, D, seed=2).requires_grad_(), drawn(V, D, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(Again.apply, (hidden, weight))


def test_the_order_of_rows_does_not_matter() -> None:
    hidden, weight = drawn(TOKENS, D, seed=4), drawn(V, D, seed=5)
    student, order = signal(hidden, weight), torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    shuffled = {name: getattr(student.positions, name)[order] for name in ("index", "labels", "sequence")}
    other = replace(student, hidden=hidden[order], positions=Positions(**shuffled))
    torch.testing.assert_close(REDI()(other, None).sum, REDI()(student, None).sum, rtol=1e-12, atol=1e-12)


def test_the_same_text_right_and_wrong_cancels_at_alpha_1() -> None:
    """Which is why alpha below 1: something is left that pulls towards the right answers."""
    weight = drawn(V, D, seed=6)
    positions = Positions(index=torch.arange(4), labels=torch.zeros(4, dtype=torch.long), sequence=torch.tensor([0, 1, 0, 1]))
    hidden = drawn(1, D, seed=7).repeat(4, 1)
    student = StudentSignal(hidden=hidden, head=Head(weight=weight), positions=positions)
    symmetric, default, alone = (REDI(alpha=alpha)(student, None).sum.item() for alpha in (1.0, 0.8, 0.0))
    assert symmetric == pytest.approx(0.0, abs=1e-12)
    assert default == pytest.approx(0.2 * alone, rel=1e-12) and alone > 0


@pytest.mark.parametrize("options", [{"alpha": -0.1}, {"positive_weight": -1.0}, {"positive_weight": 0.0, "alpha": 0.0}])
def test_weights_that_teach_nothing_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="REDI needs positive_weight and alpha of 0 or more"):
        REDI(**options)


def test_an_impossible_wrong_answer_gives_no_nan() -> None:
    """A wrong answer that is ruled out already is infinitely good; it must not become NaN on its way."""
    hidden, weight = torch.zeros(2, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    positions = Positions(index=torch.arange(2), labels=torch.tensor([0, 1]), sequence=torch.tensor([0, 1]))
    bias = torch.tensor([0.0, -400.0, 0.0], dtype=torch.float64)
    loss = REDI()(StudentSignal(hidden=hidden, head=Head(weight=weight, bias=bias), positions=positions), None)
    assert loss.sum.item() == pytest.approx(math.log(2) - 0.8 * (400 + math.log(2)), rel=1e-12)

"""Which rows SelectiveKL keeps, against the paper's quantile."""

from __future__ import annotations

import pytest
import torch

from kdlib.objectives import ForwardKL, SelectiveKL
from kdlib.objectives.selective import potential, select, threshold
from tests.objectives.cases import logits
from tests.objectives.test_values import graded


def losses(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draft, reference = torch.rand(2, n, generator=generator, dtype=torch.float64)
    return draft, reference


@pytest.mark.parametrize("n", [1, 2, 7, 50, 333])
@pytest.mark.parametrize("fraction", [0.05, 0.4, 0.73, 1.0])
def test_the_rows_at_or_above_the_quantile_are_kept(n: int, fraction: float) -> None:
    draft, reference = losses(n, seed=n)
    delta = draft - reference
    kept = select(draft, reference, threshold(delta, fraction))
    assert torch.equal(kept, delta >= torch.quantile(delta, 1 - fraction))
    assert delta[kept].min() >= (delta[~kept].max() if (~kept).any() else -torch.inf)
    assert kept.sum() == n if fraction == 1.0 else fraction * (n - 1) < kept.sum() <= fraction * (n - 1) + 1


def test_ties_are_kept() -> None:
    draft, reference = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0, 0.0]), torch.zeros(6)
    assert select(draft, reference, threshold(draft, 0.3)).tolist() == [True, True, True, True, False, False]


def test_one_global_threshold_keeps_the_same_rows_however_they_are_split() -> None:
    draft, reference = losses(40)
    cut = threshold(draft - reference, 0.4)
    whole = select(draft, reference, cut)
    parts = [select(d, r, cut) for d, r in zip(draft.split(13), reference.split(13), strict=True)]
    assert torch.equal(torch.cat(parts), whole)
    alone = [select(d, r, threshold(d - r, 0.4)) for d, r in zip(draft.split(13), reference.split(13), strict=True)]
    assert not torch.equal(torch.cat(alone), whole)  # what the paper's per-device quantile does


def test_rows_impossible_for_both_models_are_no_gain() -> None:
    draft, reference = torch.tensor([torch.inf, torch.inf, 0.5, 0.1]), torch.tensor([torch.inf, 0.2, 0.1, 0.3])
    assert potential(draft, reference).tolist() == pytest.approx([0.0, torch.inf, 0.4, -0.2])
    assert select(draft, reference, threshold(potential(draft, reference), 0.5)).tolist() == [False, True, True, False]


def test_elsewhere_than_in_its_trainer_it_is_forward_kl() -> None:
    student, teacher, _ = logits(6)
    loss, gradient = graded(SelectiveKL(fraction=0.2, temperature=2.0), student, teacher)
    wanted, of_wanted = graded(ForwardKL(temperature=2.0), student, teacher)
    assert loss.count == 6 and torch.equal(loss.sum, wanted.sum) and torch.equal(gradient, of_wanted)

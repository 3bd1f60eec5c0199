"""The data types that the parts exchange refuse what makes no sense."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch

from kdlib import objectives
from kdlib.objectives import REDI, TAID, CrossEntropy, ForwardKL, Sinkhorn
from kdlib.objectives.cross import CrossTokenizerObjective
from kdlib.objectives.diffusion import DiffusionObjective
from kdlib.types import Head, Loss, Objective, RowObjective, Support, TeacherSignal, feeds

LOGP = torch.tensor([[0.5, 0.25], [0.6, 0.1], [0.3, 0.2]]).log()
IDS = torch.tensor([[0, 1], [2, 0], [1, 2]])
HEAD = Head(weight=torch.randn(5, 4))


@pytest.mark.parametrize(
    ("provides", "accepts", "served"),
    [
        (Support.FULL, Support.FULL, True),
        (Support.FULL, Support.TOPK, True),
        (Support.TOPK, Support.FULL, False),
        (Support.TOPK, Support.FULL | Support.TOPK, True),
        (Support.FULL, Support.SAMPLED_TEACHER, False),
        (Support.SAMPLED_TEACHER, Support.SAMPLED_STUDENT, False),
        (Support.SAMPLED_TEACHER, None, True),
        (Support.TOPK | Support.SAMPLED_TEACHER, Support.SAMPLED_TEACHER, True),
    ],
)
def test_who_feeds_whom(provides: Support, accepts: Support | None, served: bool) -> None:
    assert feeds(provides, accepts) is served


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ({}, "exactly one"),
        ({"logits": LOGP, "logp": LOGP, "ids": IDS}, "exactly one"),
        ({"hidden": torch.zeros(3, 4)}, "hidden comes with head"),
        ({"logp": LOGP, "support": Support.TOPK}, "logp with ids"),
        ({"logp": LOGP, "ids": IDS}, "cannot be Support.FULL"),
        ({"logits": LOGP, "support": Support.TOPK}, "dense cannot be Support.TOPK"),
        ({"logits": LOGP, "temperature": 2.0}, "stored at temperature 1"),
    ],
)
def test_a_teacher_signal_has_one_consistent_storage(storage: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherSignal(**storage)


def test_dense_signals_answer_at_any_temperature() -> None:
    hidden = torch.randn(3, 4)
    for signal in (TeacherSignal(hidden=hidden, head=HEAD), TeacherSignal(logits=HEAD(hidden))):
        assert (len(signal), signal.vocab_size) == (3, 5)
        for temperature in (1.0, 0.5):
            found = signal.at(slice(1, 3), temperature)
            torch.testing.assert_close(found.logp, (HEAD(hidden)[1:] / temperature).log_softmax(-1))
            assert found.ids is None and found.support is Support.FULL
            assert (found.rest == -torch.inf).all()


def test_dense_16_bit_logits_are_normalised_in_float32() -> None:
    logits = torch.randn(3, 50).bfloat16()
    found = TeacherSignal(logits=logits).at(slice(None), 1.0).logp
    torch.testing.assert_close(found, logits.float().log_softmax(-1))


def test_top_k_signals_carry_the_mass_outside() -> None:
    signal = TeacherSignal(logp=LOGP, ids=IDS, support=Support.TOPK, temperature=2.0)
    assert (len(signal), signal.vocab_size) == (3, None)
    found = signal.at(slice(0, 2), 2.0)
    torch.testing.assert_close(found.rest.exp(), torch.tensor([0.25, 0.3]))
    torch.testing.assert_close(found.logp, LOGP[:2])
    assert found.ids is not None and torch.equal(found.ids, IDS[:2])
    with pytest.raises(ValueError, match=r"cannot be re-tempered to 1\.0"):
        signal.at(slice(None), 1.0)


def test_sampled_log_probs_are_not_renormalised() -> None:
    signal = TeacherSignal(logp=LOGP, ids=IDS, support=Support.SAMPLED_TEACHER)
    assert torch.equal(signal.at(slice(None), 1.0).logp, LOGP)


def test_signals_are_cut_to_a_smaller_vocabulary_and_ids_left_alone() -> None:
    hidden = torch.randn(3, 4)
    of_head = TeacherSignal(hidden=hidden, head=HEAD).sliced(3)
    of_logits = TeacherSignal(logits=HEAD(hidden)).sliced(3)
    assert of_head.vocab_size == of_logits.vocab_size == 3
    torch.testing.assert_close(of_head.at(slice(None), 1.0).logp, of_logits.at(slice(None), 1.0).logp)
    sampled = TeacherSignal(logp=LOGP, ids=IDS, support=Support.TOPK)
    assert sampled.sliced(3) is sampled


def test_a_loss_holds_a_differentiable_sum_its_rows_and_metrics() -> None:
    student = torch.randn(4, 6, requires_grad=True)
    loss = ForwardKL().on_logits(student, torch.randn(4, 6))
    assert isinstance(loss, Loss)
    assert loss.sum.shape == () and loss.sum.requires_grad and loss.count == 4
    assert all(not total.requires_grad and count == 4 for total, count in loss.metrics.values())


def test_every_objective_meets_the_protocols() -> None:
    abstract = {"Objective", "RowObjective", "Divergence", "Sum"}
    for name in set(objectives.__all__) - abstract:
        objective = getattr(objectives, name)()
        assert isinstance(objective, Objective)
        whole = DiffusionObjective | Sinkhorn | CrossTokenizerObjective | REDI
        assert isinstance(objective, RowObjective) != isinstance(objective, whole)
        assert objective.layers == ()
        with pytest.raises(FrozenInstanceError):
            objective.temperature = 3.0
        with pytest.raises(TypeError):
            getattr(objectives, name)(1.0)  # keyword-only
        assert hash(objective) == hash(getattr(objectives, name)())


def test_the_protocols_tell_objectives_from_others() -> None:
    assert not isinstance(object(), RowObjective)
    assert isinstance(TAID(), RowObjective) and CrossEntropy().accepts is None

"""PairedTrainer's steps against a loop over single answers in float64; what may not matter; resuming; what it refuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdlib.data.pairs import PairCollator
from kdlib.objectives import REDI, CrossEntropy, ForwardKL
from kdlib.trainers import DistillationTrainer, PairedTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.small import (
    Gradients,
    V,
    assert_same,
    double,
    logged,
    lora,
    plain_gradients,
    settings,
    trainer_of,
    weights_of,
)

Row = Mapping[str, Any]
ROWS = [
    {
        "prompt": f"{'two plus ' * (1 + i % 3)}{i}",
        "chosen": " is four, because the sky is blue." * (1 + i % 2),
        "rejected": " is" + " blue" * (1 + 3 * i % 5),
    }
    for i in range(8)
]
SIX = ROWS[:6]


def paired_trainer(directory: Path, *, rows: Any = SIX, config: dict[str, Any] | None = None, **given: Any) -> PairedTrainer:
    arguments = {"model": double(), "train_dataset": rows, "processing_class": tiny_tokenizer(), **given}
    options = {"per_device_train_batch_size": 6, "max_grad_norm": 1e9, **(config or {})}
    return PairedTrainer(**arguments, args=settings(directory, **options))


def one_step(directory: Path, **given: Any) -> tuple[PairedTrainer, dict[str, Tensor]]:
    gradients = Gradients()
    trainer = paired_trainer(directory, callbacks=[gradients], **given)
    trainer.train()
    return trainer, gradients.steps[0]


def rewards(student: nn.Module, rows: Iterable[Row], prefix: str = "") -> list[Tensor]:
    """log q(y) / |y| of each answer there is, from whole logits of one unpadded answer after another."""
    found = []
    for row in rows:
        if row[f"{prefix}input_ids"]:
            ids, labels = torch.tensor([row[f"{prefix}input_ids"]]), torch.tensor(row[f"{prefix}labels"])[1:]
            logp = student(input_ids=ids).logits[0, :-1, :V].log_softmax(-1)
            found.append(logp[labels != -100].gather(-1, labels[labels != -100][:, None]).mean())
    return found


def plain(student: nn.Module, rows: Any, *, positive: float = 1.0, alpha: float = 0.8) -> Tensor:
    """The mean over pairs, from its definition."""
    chosen, rejected = rewards(student, rows), rewards(student, rows, "rejected_")
    return (-positive * torch.stack(chosen).sum() + alpha * torch.stack(rejected).sum()) / len(chosen)


@pytest.mark.parametrize("objective", [None, REDI(alpha=0.3), REDI(alpha=1.0, positive_weight=0.5)])
def test_loss_and_gradient_are_those_of_the_definition(tmp_path: Path, objective: REDI | None) -> None:
    trainer, found = one_step(tmp_path, objective=objective)
    options = REDI() if objective is None else objective
    expected = plain(student := double(), trainer.train_dataset, positive=options.positive_weight, alpha=options.alpha)
    assert logged(trainer)[0] == pytest.approx(expected.item(), rel=1e-6)
    assert_same(found, plain_gradients(student, expected))


@pytest.mark.parametrize(
    "given",
    [
        {"config": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}},
        {"config": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 6}},
        {"rows": SIX[::-1]},
    ],
    ids=["3x2", "1x6", "reversed"],
)
def test_batches_accumulation_and_order_do_not_matter(tmp_path: Path, given: dict[str, Any]) -> None:
    """Answers are of unequal lengths, so that a mean over tokens, or of means of micro-batches, would show."""
    plain_run, expected = one_step(tmp_path)
    other, found = one_step(tmp_path, **given)
    for key in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert logged(other, key) == pytest.approx(logged(plain_run, key), rel=1e-6), key
    assert_same(found, expected)


def test_padding_does_not_matter(tmp_path: Path) -> None:
    class Wide(PairCollator):
        def __call__(self, rows: Any) -> dict[str, Any]:
            batch, fill = super().__call__(rows), {"input_ids": 0, "labels": -100, "attention_mask": 0}
            padded = {name: nn.functional.pad(batch[name], (0, 23), value=value) for name, value in fill.items()}
            return {**batch, **padded, "sequence": nn.functional.pad(batch["sequence"], (0, 23), mode="replicate")}

    plain_run, expected = one_step(tmp_path)
    wide, found = one_step(tmp_path, data_collator=Wide(0))
    assert logged(wide) == pytest.approx(logged(plain_run), rel=1e-6)
    assert_same(found, expected)


def test_pairs_without_a_wrong_answer_count_as_pairs(tmp_path: Path) -> None:
    rows = [*SIX[:4], *({**row, "rejected": None} for row in SIX[4:])]
    for config in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}):
        trainer, found = one_step(tmp_path, rows=rows, config={"unpaired": "positives", **config})
        expected = plain(student := double(), trainer.train_dataset)
        assert logged(trainer)[0] == pytest.approx(expected.item(), rel=1e-6)
        assert_same(found, plain_gradients(student, expected))
    dropped = paired_trainer(tmp_path, rows=rows)
    assert len(dropped.train_dataset) == 4


def test_lora(tmp_path: Path) -> None:
    trainer, found = one_step(tmp_path, peft_config=lora())
    twin = paired_trainer(tmp_path, peft_config=lora()).model
    expected = plain(twin, trainer.train_dataset)
    assert logged(trainer)[0] == pytest.approx(expected.item(), rel=1e-6)
    assert_same(found, plain_gradients(twin, expected))


def test_what_is_logged(tmp_path: Path) -> None:
    trainer, _ = one_step(tmp_path)
    with torch.no_grad():
        chosen, rejected = (torch.stack(rewards(double(), trainer.train_dataset, prefix)) for prefix in ("", "rejected_"))
    expected = {
        "chosen": chosen.mean(),
        "rejected": rejected.mean(),
        "margins": (chosen - rejected).mean(),
        "accuracies": (chosen > rejected).double().mean(),
    }
    for name, value in expected.items():
        assert logged(trainer, f"rewards/{name}")[0] == pytest.approx(value.item(), rel=1e-6), name
    assert "entropy_student" in trainer.state.log_history[0]


def test_evaluation_is_the_mean_over_pairs_whatever_the_batch(tmp_path: Path) -> None:
    found = []
    for size in (1, 3, 5):
        trainer = paired_trainer(tmp_path, eval_dataset=ROWS[:5], config={"per_device_eval_batch_size": size})
        found.append(trainer.evaluate())
    assert trainer.eval_dataset is not None
    with torch.no_grad():
        expected = plain(double(), trainer.eval_dataset).item()
    for metrics in found:
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
        assert metrics["eval_rewards/margins"] == pytest.approx(found[0]["eval_rewards/margins"], rel=1e-6)


def test_training_parts_right_from_wrong(tmp_path: Path) -> None:
    config = {"max_steps": 20, "learning_rate": 1e-3, "lr_scheduler_type": "constant"}
    trainer = paired_trainer(tmp_path, model=tiny_llama(V), config=config)
    trainer.train()
    margins, chosen = logged(trainer, "rewards/margins"), logged(trainer, "rewards/chosen")
    assert margins[-1] > margins[0] + 1.0 and chosen[-1] > chosen[0], "right answers do not fall with the wrong ones"
    assert logged(trainer, "rewards/accuracies")[-1] == 1.0


@pytest.mark.parametrize("options", [{}, {"curriculum": "hard"}], ids=["plain", "curriculum"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = [{**row, "hard": i} for i, row in enumerate(ROWS)]
    config = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        **options,
    }
    whole, resumed = (
        paired_trainer(tmp_path / name, model=tiny_llama(V, attention_dropout=0.2), rows=rows, config=config)
        for name in ("whole", "resumed")
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    for name, expected in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], expected), name
    assert logged(resumed)[-1] == logged(whole)[-1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda at: paired_trainer(at, objective=CrossEntropy()), "PairedTrainer trains REDI, not CrossEntropy"),
        (lambda at: trainer_of(at, objective=REDI()), "REDI is a loss of pairs of answers: train with kdlib distill"),
        (lambda at: paired_trainer(at, config={"packing": True}), "packing puts rows together"),
        (lambda at: paired_trainer(at, config={"on_policy_fraction": 0.5}), "leave on_policy_fraction out"),
        (lambda at: paired_trainer(at, config={"domain_column": "prompt"}), "domain_column compares student and teacher"),
        (lambda at: paired_trainer(at, config={"curriculum": "hard"}), "the rows have no column hard"),
        (lambda at: paired_trainer(at, config={"max_pairs": 0}), "max_pairs must be at least 1"),
        (lambda at: paired_trainer(at, config={"unpaired": "keep"}), "unpaired is drop or positives, not keep"),
        (lambda at: paired_trainer(at, rows=[{"text": "a"}]), "pairs are a directory of kdlib generate"),
    ],
)
def test_what_is_refused(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        make(tmp_path)
    assert "\n" not in str(caught.value)


def test_it_is_a_distillation_trainer(tmp_path: Path) -> None:
    assert isinstance(paired_trainer(tmp_path), DistillationTrainer)
    assert paired_trainer(tmp_path).objective == REDI() != ForwardKL()

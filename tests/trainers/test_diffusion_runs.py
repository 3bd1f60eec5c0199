"""What may not matter to diffusion training: batches, padding, precision, checkpoints, resuming; odd rows; its memory."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdlib.diffusion import spec_of
from kdlib.objectives.diffusion import (
    CertaintyForcing,
    DiffusionForcing,
    DiffusionObjective,
    MaskConsistency,
    MaskedELBO,
    SharpenedKL,
    StepHalving,
)
from kdlib.teachers import SelfTeacher
from kdlib.trainers import DiffusionTrainer
from tests.tiny import tiny_llama
from tests.trainers.diffusion_plain import EOS, FAVOURED, SIZE, Plain, Text, mean, text, texts
from tests.trainers.diffusion_steps import BLOCKS, diffusion_trainer, dllm, masked_of, one_step
from tests.trainers.small import Logits, assert_same, logged, lora, weights_of

EIGHT = [*texts(seed=2), *texts(seed=3)]
CERTAIN = CertaintyForcing(certainty_on="first")
CLEAN = {"context": "clean"}

# objective, spec of the student, options of the trainer
CASES: dict[str, tuple[DiffusionObjective, dict[str, Any], dict[str, Any]]] = {
    "elbo": (MaskedELBO(), {"shift": True}, {}),
    "elbo-sequence-padded": (MaskedELBO(normalize="sequence"), {"eos_padding": "length"}, {"response_length": 12}),
    "elbo-clean": (MaskedELBO(), BLOCKS, {**CLEAN, "masking": "per_block"}),
    "cart": (MaskedELBO(weighting="cart"), {}, {"masking": "blocks"}),
    "certainty": (CertaintyForcing(weight=0.0), {}, {}),
    "trajectory": (CertaintyForcing(weight=0.0), {}, {"masking": "trajectory", "ratio_range": [0.2, 0.8]}),
    "consistency": (MaskConsistency(distill_weight=1.0), {}, {}),
    "sharpened": (SharpenedKL(), {}, {}),
    "halving": (StepHalving(sampling_steps=8, rounds=1), {}, {}),
    "forcing": (DiffusionForcing(), BLOCKS, {}),
}
cases = pytest.mark.parametrize("case", list(CASES))


def step_of(
    directory: Path, rows: list[Text] | Dataset, case: str, **config: Any
) -> tuple[DiffusionTrainer, dict[str, Tensor]]:
    objective, spec, options = CASES[case]
    return one_step(directory, rows, model=dllm(**spec), objective=objective, config={**options, **config})


@cases
def test_how_a_step_is_split_and_padded_does_not_matter(tmp_path: Path, case: str) -> None:
    """Eight rows at once, and in four micro-batches of other widths."""
    whole, expected = step_of(tmp_path, EIGHT, case)
    parts, found = step_of(tmp_path, EIGHT, case, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert_same(found, expected)
    assert logged(parts) == pytest.approx(logged(whole), rel=1e-6)
    assert logged(parts, "scored_tokens") == logged(whole, "scored_tokens")


@pytest.mark.parametrize("case", ["elbo-clean", "halving", "forcing"])
def test_order_and_batch_mates_do_not_matter(tmp_path: Path, case: str) -> None:
    """The sum over two rows beside another one is that of the two and of the one, however wide the batch is."""
    long = text(random.Random(9), (5, 24))
    rows, sums = EIGHT[:2], []
    for given in (rows, rows[::-1], [long], [*rows, long], [long, *rows]):
        trainer, _ = step_of(tmp_path, given, case)
        sums.append(logged(trainer)[0] * logged(trainer, "scored_tokens")[0])
    two, reversed_two, one, three, other_three = sums
    assert reversed_two == pytest.approx(two, rel=1e-9)
    assert [three, other_three] == [pytest.approx(two + one, rel=1e-6)] * 2


@pytest.mark.parametrize("case", ["elbo-sequence-padded", "consistency"])
def test_evaluation_does_not_depend_on_its_batch_size(tmp_path: Path, case: str) -> None:
    objective, spec, options = CASES[case]
    found = []
    for size in (1, 3, 8):
        held_out = diffusion_trainer(tmp_path, EIGHT).train_dataset
        given = {"model": dllm(**spec), "objective": objective, "eval_dataset": held_out}
        trainer = diffusion_trainer(tmp_path, EIGHT, config={**options, "per_device_eval_batch_size": size}, **given)
        measured = trainer.evaluate()
        assert trainer.evaluate()["eval_loss"] == measured["eval_loss"], "the same draws each time"
        found.append(measured["eval_loss"])
    assert found[1:] == [pytest.approx(found[0], rel=1e-6)] * 2


def test_evaluation_is_the_plain_loss(tmp_path: Path) -> None:
    held_out = diffusion_trainer(tmp_path, EIGHT).train_dataset
    trainer = diffusion_trainer(tmp_path, EIGHT[:2], eval_dataset=held_out)
    rows = [masked_of(trainer, row, step=0, progress=1.0) for row in EIGHT]
    expected = mean([Plain(dllm()).elbo(row, weighting="elbo", normalize="token") for row in rows])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected.item(), rel=1e-6)


# Rows that have little or nothing to mask


PROMPT = Text([5, 6, 7, 8], [False] * 4, [])  # without a response there are no steps, so rows without them stand beside it
SHORT = Text([5, 6, FAVOURED], [False, False, True], [3])


@pytest.mark.parametrize("case", [case for case in CASES if case != "trajectory"])
def test_rows_without_a_maskable_token_add_nothing(tmp_path: Path, case: str) -> None:
    """Beside others they change nothing; a step of nothing else is one of no gradient."""
    rows = EIGHT[:3]
    _, expected = step_of(tmp_path, rows, case)
    one_by_one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    _, found = step_of(tmp_path, stepless([PROMPT, *rows]), case, **one_by_one)
    assert_same(found, expected)
    _, found = step_of(tmp_path, stepless([PROMPT, *rows]), case)
    assert_same(found, expected)
    trainer, nothing = step_of(tmp_path, stepless([PROMPT, PROMPT]), case)
    assert logged(trainer) == [0.0] and all(not gradient.any() for gradient in nothing.values())


def stepless(rows: list[Text]) -> Dataset:
    return Dataset.from_list([row.row() for row in rows]).remove_columns("commit_step")


@cases
def test_a_batch_of_one_short_row(tmp_path: Path, case: str) -> None:
    trainer, found = step_of(tmp_path, [SHORT], case)
    assert torch.isfinite(torch.tensor(logged(trainer))).all()
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


def test_nothing_explodes_while_no_token_is_right(tmp_path: Path) -> None:
    """The certainty terms are then 0, without gradient: the step is that of the cross-entropies alone."""
    unlikely = [
        Text([EOS if own else x for x, own in zip(row.ids, row.learnt, strict=True)], row.learnt, row.steps) for row in EIGHT
    ]
    trainer, found = one_step(tmp_path, unlikely, objective=CertaintyForcing(weight=5.0))
    assert logged(trainer, "masked_accuracy") == [0.0]
    _, expected = one_step(tmp_path, unlikely, objective=CertaintyForcing(weight=0.0))
    assert_same(found, expected)


def test_certainty_makes_what_is_right_surer(tmp_path: Path) -> None:
    config = {"max_steps": 12, "masking": "response", "learning_rate": 3e-3}
    trainer, _ = one_step(tmp_path, EIGHT, objective=CertaintyForcing(), config=config)
    entropies, accuracy = logged(trainer, "entropy_of_right"), logged(trainer, "masked_accuracy")
    assert all(0.0 < value < 1.0 for value in accuracy) and accuracy[-1] > accuracy[0]
    assert entropies[-1] < 0.5 * entropies[0]


# Precision, adapters, checkpoints


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, reentrant: bool) -> None:
    _, expected = step_of(tmp_path, EIGHT, "forcing")
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    _, found = step_of(tmp_path, EIGHT, "forcing", **options)
    assert_same(found, expected, tolerance=1e-12)


@pytest.mark.parametrize("objective", [CERTAIN, StepHalving(sampling_steps=8, rounds=1)], ids=["certainty", "halving"])
def test_bf16_stays_close(tmp_path: Path, objective: DiffusionObjective) -> None:
    found = []
    for bf16 in (False, True):
        config = {"bf16": bf16, "max_steps": 2, "masking": "uniform"}
        trainer = diffusion_trainer(tmp_path, EIGHT, model=dllm().float(), teacher=None, objective=objective, config=config)
        trainer.train()
        found.append(torch.tensor(logged(trainer)))
    difference = (found[1] - found[0]).abs()
    assert (difference > 1e-7).any(), "bf16 computed in float32"
    assert (difference < 0.05 * found[0] + 0.05).all()


def test_lora_is_merged_into_what_is_published(tmp_path: Path) -> None:
    trainer = diffusion_trainer(tmp_path, EIGHT, model=plain_dllm(), peft_config=lora(), config={"max_steps": 2})
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    merged = AutoModelForCausalLM.from_pretrained(trainer.save_final(tmp_path / "final")).eval()
    assert spec_of(merged.config) == trainer.spec and merged.config.is_causal is False
    ids = torch.tensor([EIGHT[0].ids])
    with torch.no_grad():
        here, there = trainer.model.eval()(input_ids=ids).logits, merged(ids).logits
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


def plain_dllm(**config: Any) -> Any:
    """In float32 and of stock modules, as checkpoints are."""
    model = tiny_llama(SIZE, **config)
    model.config.is_causal, model.config.diffusion = False, copy.deepcopy(dllm().config.diffusion)
    return model


RESUMED: dict[str, tuple[DiffusionObjective, Any, dict[str, Any]]] = {
    "elbo": (MaskedELBO(), None, {}),
    "certainty": (CERTAIN, None, {"masking": "trajectory", "block_schedule": [2, 4]}),
    "averaged": (MaskConsistency(), "ema", {}),
    "refreshed": (StepHalving(sampling_steps=16, rounds=4, refresh_steps=1), "copy", {}),
    "copied-at-the-start": (SharpenedKL(), "copy", {"masking": "uniform"}),
}


@pytest.mark.parametrize("name", list(RESUMED))
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, name: str) -> None:
    objective, kind, options = RESUMED[name]
    config = {**options, "max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2}

    def trainer() -> DiffusionTrainer:
        model = plain_dllm(attention_dropout=0.2)
        teacher = None if kind is None else SelfTeacher(kind)
        return diffusion_trainer(tmp_path, EIGHT, model=model, objective=objective, teacher=teacher, config=config)

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for parameter, expected in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[parameter], expected), parameter
    assert logged(resumed)[-2:] == logged(whole)[-2:]
    assert len(set(logged(whole))) == 4
    if name == "refreshed":
        assert resumed.objective_state == whole.objective_state == {"round": 3.0}


# Memory


@pytest.mark.parametrize("case", ["certainty", "consistency", "sharpened", "halving", "forcing", "elbo-clean"])
def test_logits_of_all_tokens_are_never_there_at_once(tmp_path: Path, case: str) -> None:
    """The largest [rows, V] is a chunk of the kernel, however long the rows."""
    rng = random.Random(7)
    rows = [text(rng, (4, 300)) for _ in range(4)]
    objective, spec, options = CASES[case]
    config = {**options, "max_length": 512, "mask_ratio": 0.9, "masking": options.get("masking", "response")}
    trainer = diffusion_trainer(tmp_path, rows, model=dllm(**spec).float(), objective=objective, config=config)
    with Logits(SIZE) as seen:
        trainer.train()
    assert logged(trainer, "scored_tokens")[0] > 4 * 256
    assert 0 < seen.rows <= 256

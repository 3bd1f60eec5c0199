"""Options, rows, teachers, objectives and models that diffusion training does not take: one line each, nothing written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from kdlib.objectives import CrossEntropy, ForwardKL
from kdlib.objectives.diffusion import CertaintyForcing, DiffusionForcing, MaskConsistency, MaskedELBO, SharpenedKL
from kdlib.teachers import EnsembleTeacher, HFTeacher, SelfTeacher
from kdlib.teachers.write_cache import write_cache
from kdlib.trainers import DiffusionConfig, DiffusionDistillationTrainer, JacobiTrainer
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.trainers.diffusion_plain import MASK, SIZE, Text, texts
from tests.trainers.diffusion_steps import BLOCKS, MASK_TOKEN, diffusion_trainer, dllm, masked_tokenizer
from tests.trainers.small import V, lora, saved, settings_of, trainer_of

ROWS = texts()


def refused(directory: Path, message: str, rows: Any = ROWS, *, config: dict[str, Any] | None = None, **given: Any) -> None:
    with pytest.raises(ValueError, match=message) as error:
        diffusion_trainer(directory, rows, config=config, **given)
    assert len(str(error.value).splitlines()) == 1
    assert not list(directory.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packing": True}, "packing puts samples into one row.*leave it out"),
        ({"on_policy_fraction": 0.5}, "write trajectories with kdlib trajectories diffusion instead"),
        ({"response_length": 0}, "response_length must be at least 1, not 0"),
        ({"masking": "random"}, "masking 'random': choose auto, uniform"),
        ({"context": "both"}, "context 'both': choose noisy, clean"),
        ({"masking": "response", "mask_ratio": 0.0}, "mask_ratio must be above 0 and at most 1, not 0.0"),
        ({"mask_ratio": 1.5}, "mask_ratio must be above 0 and at most 1, not 1.5"),
        ({"masking": "trajectory", "ratio_range": [0.5, 0.2]}, "ratio_range needs 0 <= min <= max <= 1"),
        ({"ratio_range": [0.0, 1.2]}, "ratio_range needs 0 <= min <= max <= 1"),
        ({"block_length": 0}, "block_length and those of block_schedule must be at least 1"),
        ({"block_schedule": []}, "block_schedule is empty"),
        ({"masking": "blocks", "block_schedule": [4, 0]}, "block_length and those of block_schedule must be at least 1"),
    ],
    ids=str,
)
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_of(DiffusionConfig, tmp_path, **options)


def test_no_mask_token(tmp_path: Path) -> None:
    refused(tmp_path, 'has no mask token: add one with --mask_token "', model=tiny_llama(V), processing_class=tiny_tokenizer())


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    masked = [*ROWS, Text([5, MASK, 7], [False, False, True], [1])]
    refused(tmp_path, rf"the rows hold the mask token \(id {MASK}\)", masked)
    refused(tmp_path, r"the rows hold the mask token", eval_dataset=Dataset.from_list([row.row() for row in masked]))
    bare = Dataset.from_list([{name: x for name, x in row.row().items() if name != "commit_step"} for row in ROWS])
    config = {"masking": "trajectory"}
    refused(tmp_path, "masking trajectory needs rows of kdlib trajectories diffusion", bare, config=config)
    refused(tmp_path, "masking trajectory needs rows", eval_dataset=bare, config=config)
    refused(tmp_path, f"the rows hold token id {SIZE}", [Text([5, SIZE, 7], [False, False, True], [1])])


@pytest.mark.parametrize("objective", [ForwardKL(), CrossEntropy()], ids=["ForwardKL", "CrossEntropy"])
def test_objectives_of_other_trainers(tmp_path: Path, objective: Any) -> None:
    name = type(objective).__name__
    refused(tmp_path, f"{name} is no objective of diffusion models: .*kdlib distill", objective=objective)


@pytest.mark.parametrize("objective", [MaskedELBO(), SharpenedKL()], ids=["MaskedELBO", "SharpenedKL"])
def test_other_trainers_take_no_objective_of_masks(tmp_path: Path, objective: Any) -> None:
    with pytest.raises(ValueError, match="train with kdlib diffusion"):
        teacher = None if objective.accepts is None else tiny_llama(V, seed=1)
        trainer_of(tmp_path, objective=objective, teacher=teacher).train()
    with pytest.raises(ValueError, match=type(objective).__name__):
        JacobiTrainer(tiny_llama(V), objective=objective, processing_class=tiny_tokenizer(), train_dataset=[])


def test_attention_that_an_objective_is_not_for(tmp_path: Path) -> None:
    refused(tmp_path, "is for a student of block_causal attention: add --attention block_causal", objective=DiffusionForcing())
    config = {"attention": "full"}
    refused(tmp_path, "is for a student of block_causal", objective=DiffusionForcing(), model=dllm(**BLOCKS), config=config)


def test_teachers_that_do_not_fit(tmp_path: Path) -> None:
    consistency = MaskConsistency()
    two = EnsembleTeacher([HFTeacher(dllm(1)), HFTeacher(dllm(2))])
    refused(
        tmp_path,
        "a diffusion teacher reads masked rows in this process.*not EnsembleTeacher",
        teacher=two,
        objective=consistency,
    )
    routed = {"math": dllm(1), "code": dllm(2)}
    refused(tmp_path, "a diffusion teacher reads masked rows.*not RoutedTeacher", teacher=routed, objective=consistency)
    refused(tmp_path, "compares with no teacher: leave teacher out", teacher=SelfTeacher(), objective=CertaintyForcing())
    refused(tmp_path, "needs a student with an adapter", teacher=SelfTeacher("adapter_off"), objective=consistency)
    refused(tmp_path, "the teacher .* is causal", teacher=tiny_llama(SIZE), objective=consistency)
    other = dllm(1, mask_token_id=5)
    refused(tmp_path, f"the teacher's mask token is id 5, the student's {MASK}", teacher=other, objective=consistency)


def test_a_cache_knows_no_masked_rows(tmp_path: Path) -> None:
    rows, options = Dataset.from_list([row.row() for row in ROWS]), dict[str, Any](k=4, batch_size=4, teacher_name="tiny")
    teacher = HFTeacher(tiny_llama(SIZE, seed=1))
    write_cache(teacher, rows, directory=tmp_path / "cache", tokenizer=masked_tokenizer(), rows_per_shard=4, **options)
    with pytest.raises(ValueError, match=r"a diffusion teacher reads masked rows in this process.*not CachedTeacher"):
        diffusion_trainer(tmp_path / "run", ROWS, teacher=str(tmp_path / "cache"), objective=MaskConsistency())


def test_models_that_are_no_diffusion_models(tmp_path: Path) -> None:
    for model in (tiny_llama(SIZE), saved(tmp_path / "model", tiny_llama(SIZE))):
        with pytest.raises(ValueError, match="is no diffusion model: make one with objective MaskedELBO first"):
            diffusion_trainer(tmp_path / "run", ROWS, model=model, kind=DiffusionDistillationTrainer)
    assert not (tmp_path / "run").exists()


def test_a_new_mask_token_below_an_adapter(tmp_path: Path) -> None:
    given = {"processing_class": tiny_tokenizer(), "peft_config": lora(), "config": {"mask_token": MASK_TOKEN}}
    for rows in (V, SIZE):
        refused(tmp_path, "an adapter leaves the embedding of the new mask token", model=tiny_llama(rows), **given)


def test_an_adapter_of_a_model_that_becomes_one_is_merged(tmp_path: Path) -> None:
    config = {"merge_adapter": False}
    refused(tmp_path, "merge_adapter false would write an adapter alone", model=tiny_llama(SIZE), config=config)

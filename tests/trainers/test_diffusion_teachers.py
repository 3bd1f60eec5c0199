"""Teachers of diffusion training, against loops over single rows, in float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from kdlib.objectives.diffusion import (
    MaskConsistency,
    StepHalving,
)
from kdlib.teachers import SelfTeacher
from kdlib.trainers import DiffusionTrainer
from tests.trainers.diffusion_plain import Plain, Reader, mean
from tests.trainers.diffusion_steps import (
    BLOCKS,
    ROWS,
    assert_step,
    diffusion_trainer,
    dllm,
    masked_of,
    masked_rows,
    masked_tokenizer,
    one_step,
    uniform_of,
)
from tests.trainers.small import Gradients, Weights, forward_kl, logged, lora, reverse_kl, saved

CONSISTENCY = MaskConsistency(cross_entropy_weight=0.0, distill_weight=1.0)


def consistent(trainer: DiffusionTrainer, plain: Plain, **when: Any) -> Tensor:
    rows = [plain.consistency(row, divergence=forward_kl) for row in masked_rows(trainer, **when)]
    return mean(rows, {"cross_entropy": 0.0})


def test_the_teacher_is_the_student_itself_by_default(tmp_path: Path) -> None:
    trainer, found = one_step(tmp_path, ROWS, objective=CONSISTENCY)
    assert isinstance(trainer.teacher, SelfTeacher) and trainer.teacher.kind == "student"
    plain = Plain(dllm())
    assert_step(trainer, found, consistent(trainer, plain), student=plain.student)


@pytest.mark.parametrize("shift", [False, True])
def test_a_frozen_teacher_reads_as_its_own_configuration_says(tmp_path: Path, shift: bool) -> None:
    teacher = saved(tmp_path / "teacher", dllm(1, shift=shift), masked_tokenizer())
    trainer, found = one_step(tmp_path / "run", ROWS, model=dllm(**BLOCKS), teacher=teacher, objective=CONSISTENCY)
    plain = Plain(dllm(), Reader("noisy"), teacher=dllm(1), teacher_read=Reader(shift=shift))
    assert_step(trainer, found, consistent(trainer, plain), student=plain.student)


@pytest.mark.parametrize("kind", ["student", "adapter_off", None])
def test_an_adapted_student(tmp_path: Path, kind: Any) -> None:
    gradients, teacher = Gradients(), None if kind is None else SelfTeacher(kind)
    given = {"objective": CONSISTENCY, "teacher": teacher, "peft_config": lora(), "callbacks": [gradients]}
    trainer = diffusion_trainer(tmp_path, ROWS, **given)
    student = copy.deepcopy(trainer.model)
    trainer.train()
    plain = Plain(student, teacher=student if kind == "student" else dllm())
    assert_step(trainer, gradients.steps[0], consistent(trainer, plain), student=student)
    assert all("lora_" in name for name in gradients.steps[0])


def second_step(directory: Path, teacher: SelfTeacher, **given: Any) -> tuple[DiffusionTrainer, dict[str, Tensor], list[Any]]:
    """(trainer, gradients of step 2, the student before steps 1 and 2)."""
    weights, gradients = Weights(), Gradients()
    config = {"max_steps": 2, "learning_rate": 0.02, "lr_scheduler_type": "constant"}
    trainer = diffusion_trainer(directory, ROWS, teacher=teacher, config=config, callbacks=[weights, gradients], **given)
    trainer.train()
    return trainer, gradients.steps[1], weights.steps


@pytest.mark.parametrize("kind", ["ema", "copy"])
def test_a_teacher_of_the_students_past(tmp_path: Path, kind: Any) -> None:
    trainer, found, weights = second_step(tmp_path, SelfTeacher(kind, decay=0.5), objective=CONSISTENCY)
    student, past = dllm(), dllm()
    student.load_state_dict(weights[1])
    share = 0.5 if kind == "ema" else 0.0
    past.load_state_dict({name: x + share * (weights[1][name] - x) for name, x in weights[0].items()})
    step = {"step": 2, "progress": 1.0}
    expected = consistent(trainer, Plain(student, teacher=past), **step)
    assert abs(expected.item() - consistent(trainer, Plain(student), **step).item()) > 1e-4
    assert_step(trainer, found, expected, student=student, tolerance=1e-5)  # what is kept is float32


@pytest.mark.parametrize("refreshed", [False, True])
def test_rounds_of_step_halving(tmp_path: Path, refreshed: bool) -> None:
    """In the second round the student of the first is the teacher, and its steps are twice as long."""
    objective = StepHalving(sampling_steps=8, rounds=2, refresh_steps=1 if refreshed else 5)
    trainer, found, weights = second_step(tmp_path, None, objective=objective)  # type: ignore[arg-type]
    assert isinstance(trainer.teacher, SelfTeacher) and trainer.teacher.kind == "copy"
    student, past = dllm(), dllm()
    student.load_state_dict(weights[1])
    past.load_state_dict(weights[1 if refreshed else 0])
    plain, losses = Plain(student, teacher=past), []
    for row in ROWS:
        uniform = uniform_of(trainer, row, step=2)
        masked = masked_of(trainer, row, step=2, progress=1.0)
        losses.append(plain.halved(masked, sampling_steps=4 if refreshed else 8, divergence=reverse_kl, uniform=uniform))
    if refreshed:  # from the student itself only the drawn tokens differ
        assert logged(trainer)[1] > 1e-4
    assert_step(trainer, found, mean(losses), student=student, tolerance=1e-4 if refreshed else 1e-5)

"""Consistency training against a loop over single blocks, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from kdlib.objectives import CrossEntropy, ForwardKL, GeneralizedJSD, ReverseKL
from kdlib.teachers import SelfTeacher
from tests.trainers.jacobi_plain import Pick, Trajectory, plain_ar, plain_consistency, trajectories
from tests.trainers.jacobi_steps import (
    FORCING,
    NOISIEST,
    ROWS,
    THREE,
    assert_step,
    jacobi_trainer,
    noisiest,
    one_step,
    rising,
)
from tests.trainers.small import (
    Gradients,
    V,
    Weights,
    assert_same,
    cross_entropy,
    double,
    forward_kl,
    logged,
    lora,
    plain_gradients,
    reverse_kl,
    saved,
)


def jsd(p: Tensor, q: Tensor, labels: Tensor) -> Tensor:
    m = (0.3 * p.exp() + 0.7 * q.exp()).log()
    return 0.3 * (p.exp() * (p - m)).sum(-1) + 0.7 * (q.exp() * (q - m)).sum(-1)


@pytest.mark.parametrize(
    ("objective", "plain"),
    [(ForwardKL(), forward_kl), (ReverseKL(), reverse_kl), (GeneralizedJSD(beta=0.3), jsd), (CrossEntropy(), cross_entropy)],
)
def test_global_consistency_is_that_of_single_blocks(tmp_path: Path, objective: Any, plain: Any) -> None:
    trainer, found = one_step(tmp_path, ROWS, objective=objective)
    student = double()
    consistency = plain_consistency(student, ROWS, plain)
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, ROWS))


def test_without_arguments_it_is_forward_kl_to_the_student_itself(tmp_path: Path) -> None:
    trainer = jacobi_trainer(tmp_path, ROWS)
    assert trainer.objective == ForwardKL()
    assert isinstance(trainer.teacher, SelfTeacher) and trainer.teacher.kind == "student"
    assert trainer.state_source == "stored"


def test_local_consistency_teaches_the_next_state(tmp_path: Path) -> None:
    trainer, found = one_step(tmp_path, THREE, config={"consistency": "local", **NOISIEST})
    student = double()
    consistency = plain_consistency(student, THREE, forward_kl, pick=noisiest, local=True)
    on_text = plain_consistency(student, THREE, forward_kl, pick=noisiest)
    assert abs(consistency.item() - on_text.item()) > 1e-3
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, THREE))


def test_where_the_next_state_is_the_text_local_is_global(tmp_path: Path) -> None:
    _, found = one_step(tmp_path, ROWS, config={"consistency": "local"})
    _, expected = one_step(tmp_path, ROWS)
    assert_same(found, expected)


@pytest.mark.parametrize("window", [2, 3])
def test_jacobi_forcing_reads_noisy_blocks_before_a_block(tmp_path: Path, window: int) -> None:
    trainer, found = one_step(tmp_path, THREE, config={**FORCING, "window_size": window})
    student = double()

    def pick(row: Trajectory) -> Pick:
        return rising(row, window=window)

    consistency = plain_consistency(student, THREE, forward_kl, pick=pick, window=window)
    on_clean = plain_consistency(student, THREE, forward_kl, pick=pick)
    assert abs(consistency.item() - on_clean.item()) > 1e-3
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, THREE))


def test_a_schedule_with_clean_context(tmp_path: Path) -> None:
    trainer, found = one_step(tmp_path, THREE, config={**FORCING, "context": "clean"})
    student = double()
    consistency = plain_consistency(student, THREE, forward_kl, pick=rising)
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, THREE))


def test_weights_are_those_of_the_terms(tmp_path: Path) -> None:
    trainer, found = one_step(tmp_path, ROWS, config={"ar_weight": 0.3, "consistency_weight": 2.0})
    student = double()
    consistency = 2.0 * plain_consistency(student, ROWS, forward_kl)
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, ROWS), weight=0.3)


@pytest.mark.parametrize("options", [{}, {"consistency": "local", **NOISIEST}, FORCING])
@pytest.mark.parametrize("path", [False, True])
def test_a_frozen_teacher(tmp_path: Path, path: bool, options: dict[str, Any]) -> None:
    plain = double(1)
    teacher = saved(tmp_path / "teacher", double(1)) if path else double(1)
    trainer, found = one_step(tmp_path / "run", THREE, teacher=teacher, config={**NOISIEST, **options})
    student = double()
    how: dict[str, Any] = {"local": "consistency" in options, "window": 2 if options == FORCING else None}
    how["pick"] = rising if options == FORCING else noisiest
    consistency = plain_consistency(student, THREE, forward_kl, teacher=plain, **how)
    assert_step(trainer, found, student, consistency=consistency, ar=plain_ar(student, THREE))


def averaged(
    directory: Path, rows: Sequence[Trajectory], *, config: dict[str, Any], **given: Any
) -> tuple[float, dict[str, Tensor], nn.Module, nn.Module]:
    """(loss and gradients of step 2, the student there, its teacher: halfway between the student's two first weights)."""
    weights, gradients = Weights(), Gradients()
    config = {"max_steps": 2, "learning_rate": 0.05, "lr_scheduler_type": "constant", **config}
    teacher, callbacks = SelfTeacher("ema", decay=0.5), [weights, gradients]
    trainer = jacobi_trainer(directory, rows, teacher=teacher, config=config, callbacks=callbacks, **given)
    trainer.train()
    student, average = double(), double()
    student.load_state_dict(weights.steps[1])
    average.load_state_dict({name: 0.5 * (x + weights.steps[1][name]) for name, x in weights.steps[0].items()})
    return logged(trainer)[1], gradients.steps[1], student, average


@pytest.mark.parametrize("options", [{}, {"consistency": "local", **NOISIEST}])
def test_an_averaged_teacher(tmp_path: Path, options: dict[str, Any]) -> None:
    rows = THREE if options else ROWS
    loss, gradients, student, average = averaged(tmp_path, rows, config=options)
    how: dict[str, Any] = {"local": True, "pick": noisiest} if options else {}
    by_average, by_student = (
        plain_consistency(student, rows, forward_kl, teacher=teacher, **how) + plain_ar(student, rows)
        for teacher in (average, student)
    )
    assert abs(by_average.item() - by_student.item()) > 1e-4
    assert loss == pytest.approx(by_average.item(), rel=1e-5)  # averages are kept in float32
    assert_same(gradients, plain_gradients(student, by_average), tolerance=1e-5)


@pytest.mark.parametrize("options", [{}, {"consistency": "local", **NOISIEST}])
@pytest.mark.parametrize("kind", ["student", "adapter_off"])
def test_lora(tmp_path: Path, kind: Any, options: dict[str, Any]) -> None:
    """The student's own distributions, or those of the model below its adapter."""
    rows, gradients = (THREE if options else ROWS), Gradients()
    trainer = jacobi_trainer(
        tmp_path, rows, teacher=SelfTeacher(kind), peft_config=lora(), callbacks=[gradients], config=options
    )
    student = copy.deepcopy(trainer.model)
    trainer.train()
    how: dict[str, Any] = {"local": True, "pick": noisiest} if options else {}
    below = double() if kind == "adapter_off" else student
    consistency = plain_consistency(student, rows, forward_kl, teacher=below, **how)
    assert_step(trainer, gradients.steps[0], student, consistency=consistency, ar=plain_ar(student, rows))
    assert all("lora_" in name for name in gradients.steps[0])


def with_reference(row: Trajectory, *, kept: int) -> Trajectory:
    """The first ``kept`` of 8 tokens as in the completion, the others as in no completion: a distance of 1 - kept / 8."""
    assert len(row.completion) == 8
    others = [token for token in range(3, V) if token not in row.completion]
    return Trajectory(row.prompt, row.completion, row.blocks, row.completion[:kept] + others[: 8 - kept])


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        ({"ar_labels": "trajectory"}, []),
        ({"ar_labels": "mixed", "max_distance": 0.5}, [0, 3]),
        ({"ar_labels": "mixed", "max_distance": 0.49}, [0, 2, 3]),
        ({"ar_labels": "mixed", "max_distance": 1.0}, []),
        ({"ar_labels": "dataset"}, [0, 1, 2, 3]),
    ],
    ids=str,
)
def test_labels_of_the_data_set_replace_a_text_that_is_too_far(
    tmp_path: Path, options: dict[str, Any], replaced: list[int]
) -> None:
    """Distances 1, 0.25, 0.5 and 0.625, and a row without a reference."""
    rows = trajectories(seed=5, lengths=(8, 8, 8, 8, 8))
    rows = [*(with_reference(row, kept=kept) for row, kept in zip(rows, (0, 6, 4, 3), strict=False)), rows[4]]
    rows[4] = Trajectory(rows[4].prompt, rows[4].completion, rows[4].blocks, [])
    trainer, found = one_step(tmp_path, rows, config=options)
    student = double()
    ar = plain_ar(student, rows, replaced=lambda row: rows.index(row) in replaced)
    assert_step(trainer, found, student, consistency=plain_consistency(student, rows, forward_kl), ar=ar)


def test_rows_with_nothing_wrong_have_no_consistency(tmp_path: Path) -> None:
    rows = trajectories(states=1)
    trainer, found = one_step(tmp_path, rows)
    student = double()
    expected = plain_ar(student, rows)
    assert logged(trainer) == [pytest.approx(expected.item(), rel=1e-6)]
    assert_same(found, plain_gradients(student, expected))


KINDS = pytest.mark.parametrize("consistency", ["global", "local"])
OBJECTIVES = pytest.mark.parametrize(("objective", "plain"), [(ForwardKL(), forward_kl), (CrossEntropy(), cross_entropy)])


@KINDS
@OBJECTIVES
def test_the_text_learns_the_distributions_of_a_frozen_teacher(
    tmp_path: Path, objective: Any, plain: Any, consistency: str
) -> None:
    config = {"ar_labels": "teacher", "ar_weight": 0.7, "consistency": consistency, **NOISIEST}
    trainer, found = one_step(tmp_path, THREE, teacher=double(1), objective=objective, config=config)
    student, teacher = double(), double(1)
    states = plain_consistency(student, THREE, plain, teacher=teacher, pick=noisiest, local=consistency == "local")
    ar = plain_ar(student, THREE, teacher=teacher)
    assert abs(ar.item() - plain_ar(student, THREE).item()) > 1e-2
    assert_step(trainer, found, student, consistency=states, ar=ar, weight=0.7, term="ar/kl_forward")


@KINDS
@OBJECTIVES
def test_the_text_learns_the_distributions_of_an_averaged_teacher(
    tmp_path: Path, objective: Any, plain: Any, consistency: str
) -> None:
    config = {"ar_labels": "teacher", "ar_weight": 3.0, "consistency": consistency, **NOISIEST}
    loss, gradients, student, average = averaged(tmp_path, THREE, config=config, objective=objective)
    states = plain_consistency(student, THREE, plain, teacher=average, pick=noisiest, local=consistency == "local")
    ar = plain_ar(student, THREE, teacher=average)
    assert ar.item() > 1e-3, "the average must have moved to teach anything"
    assert loss == pytest.approx((states + 3.0 * ar).item(), rel=1e-5)
    assert_same(gradients, plain_gradients(student, states + 3.0 * ar), tolerance=1e-5)

"""Which rows take part in SinkhornTrainer's larger groups: numbers of (seed, step, sample), whatever else a step holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.data import DistillationCollator
from kdlib.objectives import Sinkhorn
from tests.trainers.sinkhorn_plain import draws_of
from tests.trainers.small import double, logged, weights_of
from tests.trainers.test_sinkhorn import BY_BATCH, BY_SEQUENCE, ROWS, sinkhorn_trainer, watched

DRAWN = replace(BY_SEQUENCE, max_rows=7)
BATCHED = replace(BY_BATCH, max_rows=7)  # groups of a micro-batch are always larger


def drawn(
    directory: Path, *, rows: Any = ROWS[:12], objective: Sinkhorn = BATCHED, **given: Any
) -> list[dict[int, list[float]]]:
    """{sample: its rows' numbers} of each step."""
    given["config"] = {"max_steps": 2, "per_device_train_batch_size": 12, **given.get("config", {})}
    trainer = sinkhorn_trainer(directory, objective, rows=rows, **given)
    seen = watched(trainer)
    trainer.train()
    parts = len(seen.draws) // 2
    return [{k: v for batch in seen.draws[i * parts : (i + 1) * parts] for k, v in batch.items()} for i in range(2)]


@pytest.mark.parametrize(
    "given",
    [
        {"config": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 6}},
        {"data_collator": DistillationCollator(0, pad_to_multiple_of=64)},
        {"rows": ROWS[:12][::-1]},
        {"config": {"data_seed": 9}},
        {"config": {"packing": True, "max_length": 128}},
        {"model": double(2)},
        {"objective": DRAWN},
    ],
    ids=["accumulated", "padded", "reversed", "shuffled", "packed", "student", "sequence"],
)
def test_draws_follow_from_seed_step_and_sample_alone(tmp_path: Path, given: dict[str, Any]) -> None:
    expected = drawn(tmp_path)
    assert len(expected[0]) == 12
    assert drawn(tmp_path, **given) == expected


def test_draws_are_others_in_other_steps_and_with_other_seeds(tmp_path: Path) -> None:
    first, second = drawn(tmp_path)
    other, _ = drawn(tmp_path, config={"seed": 43})
    fewer, _ = drawn(tmp_path, rows=ROWS[:5])
    for sample, numbers in first.items():
        assert len({*numbers, *second[sample], *other[sample]}) == 3 * len(numbers)
    assert fewer.items() <= first.items(), "mates do not matter"
    firsts = [numbers[0] for numbers in first.values()]
    assert len(set(firsts)) == 12, "samples draw by themselves"


def test_evaluation_draws_as_in_step_0(tmp_path: Path) -> None:
    trainer = sinkhorn_trainer(tmp_path, BATCHED, eval_dataset=ROWS[:7], config={"per_device_eval_batch_size": 3})
    seen = watched(trainer)
    trainer.evaluate()
    before, found = seen.draws[:], {}
    seen.draws.clear()
    trainer.train()
    trained = {sample: numbers for batch in seen.draws for sample, numbers in batch.items()}
    seen.draws.clear()
    trainer.evaluate()
    assert seen.draws == before, "after a step they are the same"
    for batch in before:
        found |= {sample: numbers for sample, numbers in batch.items() if not any(map(_is_nan, numbers))}
    keep = draws_of(seed=trainer.args.seed, step=0)
    assert len(found) == 7
    for sample, numbers in found.items():
        assert numbers == keep({"sample_id": sample}, len(numbers)).tolist() != trained[sample]


def _is_nan(number: float) -> bool:
    return number != number


def test_no_draws_where_no_group_can_be_larger(tmp_path: Path) -> None:
    found, _ = drawn(tmp_path, objective=Sinkhorn(iterations=1))
    assert all(_is_nan(number) for numbers in found.values() for number in numbers)


@pytest.mark.parametrize("objective", [BATCHED, DRAWN], ids=["batch", "sequence"])
def test_all_rows_are_counted_whatever_takes_part(tmp_path: Path, objective: Sinkhorn) -> None:
    counts: list[int] = []
    trainer = sinkhorn_trainer(tmp_path, objective)
    original = trainer.loss_of
    trainer.loss_of = lambda *given: counts.append((loss := original(*given)).count) or loss  # type: ignore
    trainer.train()
    expected = sum(label != -100 for row in trainer.train_dataset for label in row["labels"][1:])
    assert counts == [expected] and logged(trainer, "scored_tokens") == [expected]


@pytest.mark.parametrize("objective", [BATCHED, DRAWN], ids=["batch", "sequence"])
def test_a_resumed_run_draws_the_same_rows(tmp_path: Path, objective: Sinkhorn) -> None:
    config = {"max_steps": 4, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 2, "seed": 3}
    how: dict[str, Any] = {"rows": ROWS[:12], "config": config}
    whole = sinkhorn_trainer(tmp_path, objective, **how)
    seen = watched(whole)
    whole.train()
    again = sinkhorn_trainer(tmp_path, objective, **how)
    seen_again = watched(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert seen_again.draws == seen.draws[2:]
    assert logged(again) == logged(whole)
    for name, value in weights_of(whole).items():
        assert torch.equal(weights_of(again)[name], value), name

"""Which rows a curriculum draws from, whatever the batches; that they are trained on; resuming."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from kdlib.objectives import CrossEntropy
from kdlib.trainers import DistillationTrainer
from kdlib.trainers.curriculum import Curriculum
from tests.tiny import tiny_llama
from tests.trainers.small import V, cross_entropy, logged, plain_loss, settings, trainer_of, weights_of

TEXTS = [f"{'two plus ' * (1 + 5 * i % 7)}{i} is four." for i in range(16)]
# not in the order of the rows, and two of each
ROWS = [{"text": text, "difficulty": (11 * i % 16) // 2} for i, text in enumerate(TEXTS)]
CONFIG = {"curriculum": "difficulty", "curriculum_start": 0.25, "curriculum_end": 0.5, "max_steps": 8}


def curriculum(n: int = 40, **options: Any) -> Curriculum:
    given = {"tie": range(n), "start": 0.2, "end": 0.5, "max_steps": 20, "seed": 0, **options}
    return Curriculum([float(n - i) for i in range(n)], **given)


def test_the_share_that_is_open_grows_evenly() -> None:
    made = curriculum()
    assert [made.open(step) for step in (1, 6, 11, 12, 20)] == [8, 24, 40, 40, 40]
    assert [curriculum(end=0.0).open(step) for step in (1, 20)] == [40, 40]
    assert [curriculum(start=1.0).open(step) for step in (1, 20)] == [40, 40]
    assert curriculum(3, start=0.01, tie=range(3)).open(1) == 1, "one row at least"


def test_draws_are_among_the_easiest_without_repeats_and_follow_from_seed_and_step() -> None:
    made = curriculum()
    for step in (1, 5, 20):
        rows, open_rows = made.rows(step, 8), range(40 - made.open(step), 40)  # difficulty falls with the row's number
        assert len(set(rows)) == 8 and set(rows) <= set(open_rows)
        assert curriculum().rows(step, 8) == rows
    assert curriculum(seed=1).rows(5, 8) != made.rows(5, 8) != made.rows(6, 8)
    few = made.rows(1, 20)  # more than the 8 that are open
    assert {few.count(row) for row in set(few)} <= {2, 3} and len(set(few)) == 8


def test_every_row_that_is_open_is_drawn_as_often() -> None:
    made = curriculum(10, tie=range(10), end=0.0)
    counts = torch.bincount(torch.tensor([row for step in range(1, 1001) for row in made.rows(step, 3)]), minlength=10)
    assert (counts - 300).abs().max() < 5 * math.sqrt(300)


def test_equal_difficulties_are_ordered_by_the_tie() -> None:
    made = Curriculum([1.0, 0.0, 1.0, 0.0], tie=[5, 9, 3, 8], start=1.0, end=0.5, max_steps=4, seed=0)
    assert made.order == [3, 1, 2, 0]


def chosen(directory: Path, **config: Any) -> tuple[DistillationTrainer, list[list[int]]]:
    """A trained trainer, and the difficulties of each step's rows in their order."""
    trainer = trainer_of(
        directory,
        rows=ROWS,
        objective=CrossEntropy(),
        teacher=None,
        config={**CONFIG, "per_device_train_batch_size": 4, **config},
    )
    by_sample = {row["sample_id"]: row["difficulty"] for row in trainer.train_rows.dataset}  # type: ignore[union-attr]
    steps: list[list[int]] = []
    original = trainer.prepare

    def prepare(batches: Any) -> Any:
        steps.append([by_sample[sample] for batch in batches for sample in batch["sample_id"].tolist()])
        return original(batches)

    trainer.prepare = prepare  # type: ignore[method-assign]
    trainer.train()
    return trainer, steps


def test_a_run_goes_from_easy_to_hard(tmp_path: Path) -> None:
    """Four rows a step of 16: a quarter is open at first, all from step 5 on; the run goes through two epochs."""
    trainer, steps = chosen(tmp_path)
    assert [len(step) for step in steps] == [4] * 8
    assert sorted(steps[0]) == [0, 0, 1, 1], "the four easiest rows"
    open_rows = [4, 7, 10, 13, 16, 16, 16, 16]
    for step, n in zip(steps, open_rows, strict=True):
        assert max(step) <= (n - 1) // 2
    assert logged(trainer, "curriculum/open") == [n / 16 for n in open_rows]
    assert max(max(step) for step in steps[4:]) >= 6


def test_the_same_rows_however_a_step_is_split(tmp_path: Path) -> None:
    _, expected = chosen(tmp_path)
    _, found = chosen(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert found == expected


def test_the_loss_is_that_of_the_chosen_rows(tmp_path: Path) -> None:
    trainer = trainer_of(
        tmp_path, rows=ROWS, objective=CrossEntropy(), teacher=None, config={**CONFIG, "curriculum_start": 0.25, "max_steps": 1}
    )
    trainer.train()
    assert trainer.train_rows is not None
    easy = [row for row in trainer.train_rows.dataset if row["difficulty"] < 2]
    assert logged(trainer)[0] == pytest.approx(plain_loss(tiny_llama(V), None, easy, cross_entropy).item(), rel=1e-5)


def test_several_generations_of_a_row_stand_together(tmp_path: Path) -> None:
    prompts = [{"prompt": f"two plus {i}", "completion": " is four.", "difficulty": i} for i in range(8)]
    config = {**CONFIG, "on_policy_fraction": 0.5, "num_generations": 2, "max_completion_length": 4, "max_steps": 2}
    trainer = trainer_of(tmp_path, rows=prompts, objective=CrossEntropy(), teacher=None, config=config)
    seen: list[Any] = []
    assert trainer.on_policy is not None
    original = trainer.on_policy.next
    trainer.on_policy.next = lambda pull, step: original(lambda: seen.append(batches := pull()) or batches, step=step)  # type: ignore
    trainer.train()
    rows = [row for batch in seen[0] for row in batch["rows"]]
    assert [row["generation"] for row in rows] == [0, 1, 0, 1]
    assert rows[0]["input_ids"] == rows[1]["input_ids"] != rows[2]["input_ids"] == rows[3]["input_ids"]
    assert {row["difficulty"] for row in rows} == {0, 1}


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, step: int) -> None:
    """From the middle of an epoch, its end, and the middle of the next."""
    config = {**CONFIG, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}

    def made(name: str) -> DistillationTrainer:
        return trainer_of(tmp_path / name, rows=ROWS, config=config, model=tiny_llama(V, attention_dropout=0.2))

    whole, resumed = made("whole"), made("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    for name, expected in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], expected), name
    assert logged(resumed)[-2:] == logged(whole)[-2:]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"curriculum": "absent"}, "the rows have no column absent to be chosen by, only difficulty, text"),
        ({"curriculum": "text"}, "curriculum text must hold numbers"),
        ({"curriculum_start": 0.0}, "curriculum_start is a share above 0"),
        ({"curriculum_end": 1.5}, "curriculum_end one from 0 to 1"),
        ({"packing": True}, "packing puts rows together before curriculum"),
        ({"domain_column": "text"}, "curriculum and domain_column both say which rows come next"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last would drop rows"),
    ],
)
def test_what_is_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, rows=ROWS, config={**CONFIG, **config})


def test_a_row_without_its_difficulty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the column difficulty is empty in some rows"):
        trainer_of(tmp_path, rows=[*ROWS, {"text": "four", "difficulty": None}], config=CONFIG)


def test_without_a_curriculum_nothing_changes(tmp_path: Path) -> None:
    assert settings(tmp_path).kept_columns == ()
    assert trainer_of(tmp_path, rows=ROWS).step_rows is None

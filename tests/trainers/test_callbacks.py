"""Metrics on disk, checkpoints that resume to the same bits, the objective's state, and signals."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from kdlib.objectives import TAID, CrossEntropy, ForwardKL, Sum
from kdlib.trainers import DistillationTrainer
from kdlib.trainers.callbacks import STATE_FILE, MetricsWriter, last_checkpoint
from tests.tiny import tiny_llama
from tests.trainers.small import ROWS, V, logged, trainer_of

WATCHED = {
    "kl_forward",
    "kl_reverse",
    "entropy_teacher",
    "entropy_student",
    "top1_agreement",
    "acceptance",
    "acceptance_greedy",
    "scored_tokens",
    "seen_tokens",
    "generated_tokens",
    "tokens_per_second",
}
TIMES = {"time/teacher", "time/update", "time/data"}
TRAINERS_OWN = {"step", "loss", "grad_norm", "learning_rate", "epoch"}


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def steps(directory: Path) -> list[dict[str, Any]]:
    """The training lines without what the clock decides."""
    kept = [line for line in lines(directory) if "grad_norm" in line]
    return [{key: v for key, v in line.items() if key not in {*TIMES, "tokens_per_second"}} for line in kept]


def test_every_logged_step_has_the_metrics_of_a_distiller(tmp_path: Path) -> None:
    config = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trainer_of(tmp_path, eval_dataset=ROWS[:3], config=config)
    trainer.train()
    training = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for line in training:
        assert line.keys() == WATCHED | TIMES | TRAINERS_OWN
        assert line["kl_forward"] == pytest.approx(line["loss"], rel=1e-5)
        assert 0.0 <= line["top1_agreement"] <= 1.0
    assert training[-1]["scored_tokens"] > training[0]["scored_tokens"] > 0
    evaluated = [line for line in lines(tmp_path) if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [2, 4]
    assert {
        f"eval_{key}" for key in WATCHED - {"scored_tokens", "seen_tokens", "generated_tokens", "tokens_per_second"}
    } <= evaluated[0].keys()


def test_metrics_are_measured_on_logged_steps_only(tmp_path: Path) -> None:
    """The same values whether the steps between are logged or not."""
    every = trainer_of(tmp_path / "every", config={"max_steps": 4})
    every.train()
    second = trainer_of(tmp_path / "second", config={"max_steps": 4, "logging_steps": 2, "logging_first_step": False})
    second.train()
    assert logged(second, "kl_reverse") == logged(every, "kl_reverse")[1::2]
    assert logged(second, "scored_tokens") == logged(every, "scored_tokens")[1::2]
    losses = logged(every)
    assert logged(second) == pytest.approx([(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2], rel=1e-6)


class States(TrainerCallback):
    """The objective's state after every optimizer step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.trainer: DistillationTrainer

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "grad_norm" in logs:
            self.seen.append(dict(self.trainer.objective_state))


SCHEDULED = TAID(t_start=0.2, alpha=0.1, momentum=0.5)


@pytest.mark.parametrize("objective", [SCHEDULED, Sum(parts=((0.5, SCHEDULED), (0.5, CrossEntropy())))])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_scheduled_objectives_move_once_per_step_with_the_steps_loss(tmp_path: Path, objective: Any, accumulation: int) -> None:
    states = States()
    config = {
        "max_steps": 5,
        "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 8 // accumulation,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    trainer = trainer_of(tmp_path, objective=objective, eval_dataset=ROWS[:3], callbacks=[states], config=config)
    states.trainer = trainer
    trainer.train()
    expected, state = [], objective.init_state(5)
    for step, loss in enumerate(logged(trainer), start=1):
        state = objective.update(state, loss, step)
        expected.append(state)
    assert len(states.seen) == 5
    for found, wanted in zip(states.seen, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-5)
    key = "t" if objective == SCHEDULED else "0.t"
    assert logged(trainer, f"objective/{key}") == [state[key] for state in states.seen]
    assert trainer.objective_state == states.seen[-1], "evaluation moved the state"


RESUMABLE = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 9,
    "gradient_accumulation_steps": 2,
}


def resumable(directory: Path, **config: Any) -> DistillationTrainer:
    """Dropout, a state and several epochs: everything that a checkpoint has to keep."""
    student = tiny_llama(V, attention_dropout=0.2)
    return trainer_of(directory, rows=ROWS[:14], model=student, objective=SCHEDULED, config={**RESUMABLE, **config})


def weights(trainer: DistillationTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> DistillationTrainer:
    """The run that nothing interrupts."""
    trainer = resumable(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return trainer


def directory_of(trainer: DistillationTrainer) -> Path:
    return Path(str(trainer.args.output_dir))


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_resumes_to_the_same_bits(whole: DistillationTrainer, tmp_path: Path, step: int) -> None:
    """From the middle of an epoch, from its end, and from the last step, when nothing is left to do."""
    os.symlink(directory_of(whole) / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    written = (directory_of(whole) / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(written) + '{"step": 9, "lo')  # went on after the checkpoint, was cut off
    trainer = resumable(tmp_path, save_strategy="no")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert torch.equal(weights(trainer), weights(whole))
    assert trainer.objective_state == whole.objective_state
    assert steps(tmp_path) == steps(directory_of(whole))


def test_a_checkpoint_that_was_cut_off_is_not_resumed_from(tmp_path: Path) -> None:
    for step, files in (
        (2, ["model.safetensors", STATE_FILE]),
        (10, ["model.safetensors", STATE_FILE]),
        (12, ["model.safetensors"]),
    ):
        for name in files:
            path = tmp_path / f"checkpoint-{step}" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text("{}")
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-10"
    assert last_checkpoint(tmp_path / "none") is None


def test_training_anew_in_the_same_directory_starts_the_metrics_anew(tmp_path: Path) -> None:
    for _ in range(2):
        trainer_of(tmp_path, config={"max_steps": 2}).train()
    assert [line["step"] for line in steps(tmp_path)] == [1, 2]


class Interrupt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, *, step: int, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            for _i in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "times"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGINT, 2)])
def test_a_signal_saves_stops_and_resumes_to_the_same_bits(
    whole: DistillationTrainer, tmp_path: Path, number: int, times: int
) -> None:
    """Twice at once is what launchers do with a Ctrl-C."""
    before = signal.getsignal(number)
    trainer = resumable(tmp_path, save_strategy="no")
    trainer.add_callback(Interrupt(number, step=3, times=times))
    trainer.train()
    assert trainer.signals_received.received == number
    assert trainer.state.global_step == 3
    assert signal.getsignal(number) is before
    again = resumable(tmp_path, save_strategy="no")
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(again), weights(whole))
    assert steps(tmp_path) == steps(directory_of(whole))


def test_values_that_are_not_finite_are_null_in_the_metrics(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path)
    MetricsWriter().on_log(trainer.args, trainer.state, trainer.control, logs={"a": float("nan"), "b": float("inf"), "c": 1.5})
    assert lines(tmp_path) == [{"step": 0, "a": None, "b": None, "c": 1.5}]


def test_objectives_without_a_state_log_none(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, objective=ForwardKL())
    trainer.train()
    assert trainer.objective_state == {}
    assert not [key for line in trainer.state.log_history for key in line if key.startswith("objective/")]

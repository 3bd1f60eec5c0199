"""push_to_hub of the training commands: checked before anything is trained, done with final/ alone."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from kdlib.cli.arguments import RunArguments
from kdlib.cli.card import made_of, write_card
from kdlib.cli.hub.license import check_license, licenses
from kdlib.cli.hub.target import Target, check_hub
from kdlib.cli.run_directory import RunDirectory

END, EVERY_SAVE = "end", "every_save"


def check_push(config: Mapping[str, Any]) -> None:
    """ValueError in one line for a push that would fail once the training is over; does nothing without push_to_hub."""
    if not config["push_to_hub"]:
        return
    if config["hub_strategy"] not in (END, EVERY_SAVE):
        raise ValueError(
            f"hub_strategy {config['hub_strategy']} would publish the optimizer's state: choose end, or every_save for the "
            "student at each checkpoint"
        )
    check_hub("push_to_hub")
    of = made_of(config["model"], config.get("teacher"), from_scratch=config["from_scratch"])
    check_license(config["license"], licenses(of))


def taken_target(args: Any) -> Target | None:
    """Where final/ goes, None without push_to_hub; the Trainer, which would send the whole run, is told nothing of it."""
    if not args.push_to_hub:
        return None
    args.push_to_hub = False
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    return Target(repo_id=name, private=args.hub_private_repo, revision=args.hub_revision)


def push_final(directory: RunDirectory, target: Target, *, step: int) -> str:
    """Sends final/; where that fails it stays, and the error says how to try again."""
    try:
        return target.push(directory.final, message=f"{directory.path.resolve().name}, {step:,} optimizer steps")
    except ValueError as error:
        again = f"kdlib push {directory.path} --repo_id {target.repo_id}"
        raise ValueError(f"{error}; the run itself is finished, and `{again}` tries again") from error


def push_each_save(trainer: Any, arguments: RunArguments, target: Target | None, *, log: Console) -> None:
    """Makes a run push its student at each checkpoint, where hub_strategy says so."""
    if target is not None and trainer.args.hub_strategy == EVERY_SAVE:
        trainer.add_callback(PushStudent(trainer, arguments, target, log=log))


class PushStudent(TrainerCallback):
    """hub_strategy every_save: the student as it is whenever a checkpoint is written; a push that fails is said, not fatal."""

    def __init__(self, trainer: Any, arguments: RunArguments, target: Target, *, log: Console) -> None:
        self.trainer, self.arguments, self.target, self.log = trainer, arguments, target, log

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            student = Path(folder) / Path(str(args.output_dir)).resolve().name / "final"
            self.trainer.save_final(student)
            if not state.is_world_process_zero:
                return
            command = (Path(str(args.output_dir)) / "command.txt").read_text(encoding="utf-8").splitlines()[-1]
            write_card(
                student, trainer=self.trainer, arguments=self.arguments, loss={}, scores=[], measured=[], command=command
            )
            try:
                self.target.push(student, message=f"step {state.global_step:,}")
            except ValueError as error:
                self.log.print(str(error), style="yellow", markup=False)

"""A trainer that stops in good order and goes on to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.files import write_whole
from kdlib.objectives import Objective
from kdlib.samplers import StaleEngineError
from kdlib.serving import ServerAwayError
from kdlib.trainers import setup
from kdlib.trainers.callbacks import STATE_FILE, StopOnSignal, last_checkpoint
from kdlib.trainers.evaluation import SummedEvaluation
from kdlib.trainers.meters import Stopwatch
from kdlib.trainers.on_policy import OnPolicy
from kdlib.trainers.step_rows import StepRows
from kdlib.types import Teacher

AWAY = (ServerAwayError, StaleEngineError)
# Over the whole run and all ranks: rows of the loss, tokens read by the student with gradient, tokens of rollouts.
TOTALS = ("scored_tokens", "seen_tokens", "generated_tokens")


class ResumableTrainer(SummedEvaluation):
    """A Trainer whose checkpoints hold what a step depends on beside weights and optimizer.

    That is the objective's state, the totals, the rows' chooser, rollouts that wait, and teachers made of the student.
    """

    objective: Objective
    teacher: Teacher | None
    on_policy: OnPolicy | None
    step_rows: StepRows | None
    objective_state: dict[str, float]
    totals: dict[str, Tensor]
    signals_received: StopOnSignal
    _resumed_state: dict[str, Any] | None
    _watch: Stopwatch
    _window_start: tuple[float, float]

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As Trainer.train; True resumes from the newest complete checkpoint, ValueError when there is none."""
        checkpoint: Path | None = None
        if resume_from_checkpoint is True:
            checkpoint = last_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ValueError(f"no complete checkpoint in {self.args.output_dir}: start without resuming")
        elif resume_from_checkpoint:
            checkpoint = Path(resume_from_checkpoint)
        if checkpoint is not None:
            self._resumed_state = {**json.loads((checkpoint / STATE_FILE).read_text()), "directory": checkpoint}
        try:
            return super().train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint), **options)
        except AWAY:
            if self.state.global_step > 0:
                self._save_checkpoint(self.model, trial=None)
            raise
        finally:
            self.signals_received.restore()
            if self.on_policy is not None:
                self.on_policy.clear()

    def begin(self) -> None:
        """State of the objective and counters, fresh or from the checkpoint."""
        saved, self._resumed_state = self._resumed_state, None
        self.objective_state = saved["objective"] if saved else self.objective.init_state(self.state.max_steps)
        self.totals = {name: torch.tensor(saved.get(name, 0.0) if saved else 0.0, dtype=torch.float64) for name in TOTALS}
        self._window_start = (self._watch.now(), float(self.totals["seen_tokens"]))
        if self.step_rows is not None:
            self.step_rows.begin(self, saved["rows"] if saved else None)
        if saved and self.on_policy is not None:
            self.on_policy.restore(saved["directory"], saved.get("mixture"))
        if saved:
            for teacher in setup.self_teachers(self.teacher):
                teacher.load(saved["directory"])

    def token_totals(self) -> dict[str, float]:
        """``TOTALS`` so far, over the whole run and all ranks: what methods are compared by at equal cost."""
        return {name: float(total) for name, total in self.totals.items()}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """kdlib_state.json is written last: a checkpoint without it was cut off in its writing, and is not resumed from."""
        path = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / STATE_FILE
        if self.args.should_save:
            path.unlink(missing_ok=True)  # when a step is saved twice, at a signal and at the end of its epoch
        super()._save_checkpoint(model, trial)
        for teacher in setup.self_teachers(self.teacher) if self.args.should_save else ():
            teacher.save(path.parent)
        if self.on_policy is not None and self.args.should_save:
            self.on_policy.save(path.parent)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_whole(path, json.dumps({"objective": self.objective_state, **self._choices(), **self.token_totals()}))

    def _choices(self) -> dict[str, Any]:
        """What decides which rows come next, where that changes during a run."""
        found: dict[str, Any] = {} if self.step_rows is None else {"rows": self.step_rows.chooser.state}
        if self.on_policy is not None and self.on_policy.mixture is not None:
            found["mixture"] = self.on_policy.mixture.state
        return found

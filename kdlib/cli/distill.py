"""``kdlib distill``: rows, teacher and student in; a scored, loadable final/ and a report out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdlib.cli.train import Run

if TYPE_CHECKING:
    from kdlib.trainers import DistillationTrainer

DESCRIPTION = """Trains a student on a teacher's distributions.

The same command again resumes; --overwrite true starts anew. --preview 3 shows what would be scored.

Several processes: --num_processes N, or accelerate launch -m kdlib distill ..., or
torchrun -m kdlib distill ..."""


class DistillRun(Run):
    command, description = "distill", DESCRIPTION

    def make_trainer(self, **given: Any) -> DistillationTrainer:
        return self._trainer_class()(self.arguments.model, self.arguments.teacher, **given)

    def _trainer_class(self) -> type[DistillationTrainer]:
        """The trainer of the objective."""
        from kdlib.objectives import Sinkhorn
        from kdlib.objectives.cross import CrossTokenizerObjective
        from kdlib.trainers import CrossTokenizerTrainer, DistillationTrainer, SinkhornTrainer

        if isinstance(self.arguments.objective, CrossTokenizerObjective):
            return CrossTokenizerTrainer
        return SinkhornTrainer if isinstance(self.arguments.objective, Sinkhorn) else DistillationTrainer


def run(words: list[str], *, quiet: bool = False) -> int:
    """The exit code; ``quiet`` leaves out the lines about the run, for a command that makes several."""
    return DistillRun.run(words, quiet=quiet)

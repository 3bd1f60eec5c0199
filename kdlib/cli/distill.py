"""``kdlib distill``: rows, teacher and student in; a scored, loadable final/ and a report out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

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

    def read_rows(self, name: str, *, split: str) -> Any:
        """Pairs of answers for an objective of pairs."""
        if not self._paired:
            return super().read_rows(name, split=split)
        from kdlib.data.pairs import load_pairs

        return load_pairs(name, split=split, config=self.arguments.dataset_config)

    def preview(self) -> int:
        """Of pairs, the right answers and then the wrong ones."""
        if not self._paired:
            return super().preview()
        from kdlib.data.pairs import preview_pairs
        from kdlib.trainers import PairedTrainer, setup

        tokenizer = setup.student_tokenizer(self.tokenizer_source(), self.args)
        rows = PairedTrainer.prepared_pairs(self.training_rows(), tokenizer, self.args, training=True)
        Console(soft_wrap=True, highlight=False).print(preview_pairs(rows.dataset, tokenizer, count=self.arguments.preview))
        return 0

    @property
    def _paired(self) -> bool:
        from kdlib.objectives import REDI

        return isinstance(self.arguments.objective, REDI)

    def _trainer_class(self) -> type[DistillationTrainer]:
        """The trainer of the objective."""
        from kdlib.objectives import REDI, Sinkhorn
        from kdlib.objectives.cross import CrossTokenizerObjective
        from kdlib.trainers import CrossTokenizerTrainer, DistillationTrainer, PairedTrainer, SinkhornTrainer

        if isinstance(self.arguments.objective, CrossTokenizerObjective):
            return CrossTokenizerTrainer
        if isinstance(self.arguments.objective, REDI):
            return PairedTrainer
        return SinkhornTrainer if isinstance(self.arguments.objective, Sinkhorn) else DistillationTrainer


def run(words: list[str], *, quiet: bool = False) -> int:
    """The exit code; ``quiet`` leaves out the lines about the run, for a command that makes several."""
    return DistillRun.run(words, quiet=quiet)

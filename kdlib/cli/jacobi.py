"""``kdlib jacobi``: a model and text in; the same model, decoding several tokens per forward pass, out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kdlib.cli.arguments import RunArguments
from kdlib.cli.measuring import print_unmeasured, row_prompts
from kdlib.cli.train import Run

if TYPE_CHECKING:
    from kdlib.eval import JacobiResult
    from kdlib.eval.page import Section
    from kdlib.trainers import DistillationConfig, DistillationTrainer, JacobiConfig

DESCRIPTION = """Teaches a language model to decode several tokens per forward pass without a draft: blocks of tokens are
guessed and iterated (Jacobi decoding), and training makes them settle sooner.

Rows: kdlib trajectories jacobi writes them (the model's own answers, with the states their blocks went through); any
other rows work with --state_source student or noise.

CLLM: the defaults; local consistency: --consistency local; Jacobi Forcing: --schedule progressive --context noisy.
Tokens per forward are measured before and after. The same command again resumes."""


@dataclass
class MeasureArguments:
    """How decoding is measured when training has ended, on the prompts of the evaluation rows (or the training rows).

    Args:
        max_new_tokens: tokens written for a prompt.
        limit: how many prompts; 0 measures nothing.
        batch_size: prompts at a time.
        timing: measure tokens per second beside plain greedy decoding.
    """

    max_new_tokens: int = 128
    limit: int = 64
    batch_size: int = 16
    timing: bool = True

    def __post_init__(self) -> None:
        if self.max_new_tokens < 2 or self.batch_size < 1 or self.limit < 0:
            raise ValueError("evaluate.max_new_tokens is at least 2, evaluate.batch_size at least 1, evaluate.limit at least 0")


@dataclass
class JacobiArguments(RunArguments):
    """Which model learns to decode in parallel, on which rows.

    Args:
        model: the model, a path or Hub id.
        teacher: whose distributions on the text the states learn: left out, the model's own of the same pass; SelfTeacher, for
            example {SelfTeacher: {kind: ema}}; or a path or Hub id, frozen.
        evaluate: how tokens per forward are measured at the end.
    """

    evaluate: MeasureArguments = field(default_factory=MeasureArguments)


class JacobiRun(Run):
    """A run of ``kdlib jacobi``."""

    command, description, arguments_class = "jacobi", DESCRIPTION, JacobiArguments
    arguments: JacobiArguments
    args: JacobiConfig

    @classmethod
    def config_class(cls) -> type[DistillationConfig]:
        from kdlib.trainers import JacobiConfig

        return JacobiConfig

    def make_trainer(self, **given: Any) -> DistillationTrainer:
        from kdlib.trainers import JacobiTrainer

        return JacobiTrainer(self.arguments.model, self.arguments.teacher, **given)

    def measure(self, trainer: DistillationTrainer) -> Sequence[Section]:
        """Decoding of the model as it was and as it lies in final.tmp, into eval/jacobi.json and the report."""
        from kdlib.eval.jacobi_report import jacobi_sections

        if not self.arguments.evaluate.limit:
            return ()
        try:
            found = self._measured(trainer)
        except ValueError as error:  # prompts without room or without answers: no reason to lose what was trained
            print_unmeasured(self.log, "tokens per forward are", str(error))
            return ()
        self.directory.write_json("eval/jacobi.json", {name: result.to_json() for name, result in found.items()})
        return jacobi_sections(found)

    def _measured(self, trainer: DistillationTrainer) -> dict[str, JacobiResult]:
        from kdlib.data import prompt_ids
        from kdlib.decoding.sampling import context_length
        from kdlib.eval import jacobi

        options = asdict(self.arguments.evaluate)
        room = {"limit": options.pop("limit"), "max_new_tokens": options["max_new_tokens"]}
        prompts = row_prompts(trainer, prompt_ids, **room, context=context_length(trainer.model))
        models = {"base": self.arguments.model, "trained": str(self.directory.path / "final.tmp")}
        if self.args.from_scratch:
            del models["base"]
        return {
            name: jacobi(
                model,
                prompts,
                tokenizer=trainer.processing_class,
                block_size=min(self.args.block_size, options["max_new_tokens"]),
                seed=self.args.seed,
                **options,
            )
            for name, model in models.items()
        }

    def next_command(self) -> str:
        return (
            f"kdlib evaluate jacobi --model {self.directory.final} --base {self.arguments.model} "
            f"--block_size {self.args.block_size} --prompts PROMPTS.jsonl"
        )


def run(words: list[str], *, quiet: bool = False) -> int:
    """The exit code; ``quiet`` leaves out the lines about the run."""
    return JacobiRun.run(words, quiet=quiet)

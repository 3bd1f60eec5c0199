"""``kdlib draft``: rows, a target and a draft in; a draft that accepts more, its acceptance measured, out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from kdlib.cli.arguments import LaunchArguments, RunArguments
from kdlib.cli.parsing import Options
from kdlib.cli.run_directory import Stage
from kdlib.cli.train import Run
from kdlib.objectives.selective import check_reference

if TYPE_CHECKING:
    from kdlib.eval.page import Section
    from kdlib.trainers import DistillationConfig, DistillationTrainer

DESCRIPTION = """Trains a draft for speculative decoding on its target, and measures what the target accepts.

The draft is a small model of the target's tokenizer (--model PATH), some layers of the target
(--model '{prune: {layers: [0, 3]}}'), or an EAGLE-3 head (--model eagle3, --model '{eagle3: {...}}' or a published one).

DistillSpec: any divergence, with --on_policy_fraction 1 for the draft's own text. AdaSPEC: --objective SelectiveKL
--reference train. The same command again resumes; kdlib export draft hands the result to vLLM."""
TRAIN = "train"  # the value of --reference that makes one first


@dataclass
class MeasureArguments:
    """How acceptance is measured when training has ended, on the prompts of the evaluation rows (or the training rows).

    Args:
        num_speculative_tokens: draft lengths to measure.
        temperature: of serving; 0 is greedy.
        top_k: of serving; 0 keeps all.
        top_p: of serving.
        max_new_tokens: tokens the target writes for a prompt.
        limit: how many prompts; 0 measures nothing.
        batch_size: prompts at a time.
    """

    num_speculative_tokens: list[int] = field(default_factory=lambda: [3, 5])
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    limit: int = 64
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", "max_new_tokens", "batch_size"):
            values = getattr(self, name)
            if not values or min(values if isinstance(values, list) else [values]) < 1:
                raise ValueError(f"evaluate.{name} must be at least 1, not {values}")


@dataclass
class DraftArguments(RunArguments):
    """What draft is trained for which target (the teacher), on which rows.

    Args:
        model: the draft: a path or Hub id; {prune: {layers: [...]}}; eagle3, {eagle3: {...}} or a published head.
        reference: for SelectiveKL, a model that was distilled from the same start; `train` makes it first, by this command
            with ForwardKL, in OUTPUT_DIR-reference.
        evaluate: how acceptance is measured at the end.
    """

    model: Any
    reference: str | None = None
    evaluate: MeasureArguments = field(default_factory=MeasureArguments)


class DraftRun(Run):
    """A run of ``kdlib draft``: its trainer is DraftTrainer, or EagleTrainer for a head that reads the target's features."""

    command, description, arguments_class = "draft", DESCRIPTION, DraftArguments
    arguments: DraftArguments

    @classmethod
    def check(cls, options: Options) -> None:
        arguments, launch = options.build(DraftArguments), options.build(LaunchArguments)
        check_reference(arguments.objective, arguments.reference)
        if arguments.reference is not None:
            from kdlib.cli.draft_model import head_options

            if head_options(arguments.model) is not None:
                raise ValueError("an EAGLE-3 head has all rows scored by its target: leave out reference and SelectiveKL")
        several = launch.num_processes or launch.accelerate_config or int(os.environ.get("WORLD_SIZE", "1")) > 1
        if arguments.reference == TRAIN and several:
            here, asked = _reference_run(options.config["output_dir"])
            raise ValueError(
                f"--reference train works in one process: run this command with {' '.join(asked)} first, "
                f"then with --reference {here}/final"
            )

    def build_args(self) -> DistillationConfig:
        from kdlib.cli.draft_model import head_options

        options = head_options(self.arguments.model)
        if options is None:
            return super().build_args()
        from kdlib.trainers.eagle_config import EagleConfig

        return self.options.build(EagleConfig, **options)

    def start(self, stage: Stage) -> int:
        """The exit code; the reference, where it is to be trained, comes first."""
        if self.arguments.reference == TRAIN and stage is not Stage.DONE:
            code = self._train_reference()
            if code:
                return code
        return super().start(stage)

    def _train_reference(self) -> int:
        here, asked = _reference_run(str(self.args.output_dir))
        self.log.print(f"reference model first, in {here}", markup=False)
        return type(self).run([*self.words, *asked], quiet=True)

    def tokenizer_source(self) -> str:
        from kdlib.cli.draft_model import draft_tokenizer_source

        return draft_tokenizer_source(self.arguments.model, self.arguments.teacher)

    def make_trainer(self, **given: Any) -> DistillationTrainer:
        from kdlib.cli.draft_model import make_trainer

        reference = self.arguments.reference
        if reference == TRAIN:
            reference = f"{self.args.output_dir}-reference/final"
        return make_trainer(
            self.arguments.model,
            self.arguments.teacher,
            reference=reference,
            given=given,
        )

    def measure(self, trainer: DistillationTrainer) -> Sequence[Section]:
        """Acceptance of the draft as it lies in final.tmp, into eval/acceptance.json and the report."""
        from kdlib.cli.draft_model import measure
        from kdlib.eval.acceptance_report import acceptance_sections

        options = asdict(self.arguments.evaluate)
        found = measure(trainer, self.directory.path / "final.tmp", options, log=self.log) if options["limit"] else None
        if found is None:
            return ()
        self.directory.write_json("eval/acceptance.json", found.to_json())
        return acceptance_sections({"draft": found})

    def next_command(self) -> str:
        final = self.directory.final
        return (
            f"kdlib export draft --draft {final} --target {self.arguments.teacher} --output_path {self.directory.path / 'vllm'}"
        )


def _reference_run(output_dir: str) -> tuple[str, list[str]]:
    """Where the reference of a run is trained, and with which options instead of the run's own."""
    here = f"{output_dir}-reference"
    return here, ["--objective", "ForwardKL", "--reference", "null", "--output_dir", here, "--evaluate.limit", "0"]


def run(words: list[str], *, quiet: bool = False) -> int:
    """The exit code; ``quiet`` leaves out the lines about the run."""
    return DraftRun.run(words, quiet=quiet)

"""``kdlib diffusion``: a masked diffusion language model out, from an auto-regressive one or towards fewer decoding steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from kdlib.cli.arguments import RunArguments
from kdlib.cli.measuring import print_unmeasured, row_prompts
from kdlib.cli.parsing import check_least
from kdlib.cli.train import Run
from kdlib.objectives import MaskedELBO, Objective

if TYPE_CHECKING:
    from kdlib.decoding.diffusion_decoder import DiffusionDecoder
    from kdlib.diffusion import DiffusionSpec
    from kdlib.eval.diffusion_result import DiffusionSweep
    from kdlib.eval.page import Section
    from kdlib.trainers import DiffusionConfig, DistillationConfig, DistillationTrainer

DESCRIPTION = """Trains masked diffusion language models, which write all tokens of a block at once and keep those that they are
sure of.

An auto-regressive model becomes one with the default objective, MaskedELBO (--mask_token "<|mask|>", --shift true). A diffusion
model learns to decode in fewer steps with the others: CertaintyForcing (dParallel; with --masking trajectory d3LLM),
MaskConsistency, SharpenedKL (SPEED), StepHalving (SDTT), DiffusionForcing (D2F). LLaDA and Dream load without remote code.

Rows: kdlib trajectories diffusion writes them (the model's own verified answers, with the step of each token); any other rows
work too. Forwards and tokens per forward are measured before and after. The same command again resumes."""


@dataclass
class DecodingArguments:
    """How the trained model decodes: for samples and measurements, and written into its configuration.

    Args:
        gen_length: the most tokens of a response; null for response_length, or else 256.
        block_length: tokens decoded together; null for the training's block_length.
        strategy: which tokens a step commits, Name or {Name: {field: value}}: ConfidenceThreshold, EntropyThreshold, Factor,
            LowConfidence, TopKMargin, MultiBlock, CoherentContext, SlowFast or Guided.
        temperature: 0 takes the likeliest token.
        cache: null, prefix, dual, free or, with block_causal attention, block, which is exact.
    """

    gen_length: int | None = None
    block_length: int | None = None
    strategy: Any = "ConfidenceThreshold"
    temperature: float = 0.0
    cache: Literal["prefix", "dual", "free", "block"] | None = None

    def __post_init__(self) -> None:
        check_least(self, {"gen_length": 1, "block_length": 1})


@dataclass
class DiffusionMeasureArguments:
    """How decoding is measured when training has ended, on the prompts of the evaluation rows (or the training rows).

    Args:
        limit: how many prompts; 0 measures nothing.
        batch_size: prompts at a time.
    """

    limit: int = 64
    batch_size: int = 16

    def __post_init__(self) -> None:
        check_least(self, {"limit": 0, "batch_size": 1})


@dataclass
class DiffusionArguments(RunArguments):
    """Which model becomes, or stays, a diffusion model, on which rows.

    Args:
        model: the model, a path or Hub id.
        teacher: for objectives that compare with one: left out, the model itself (below its adapter with use_peft);
            SelfTeacher, for example {SelfTeacher: {kind: ema}}; or a path or Hub id, frozen.
        objective: MaskedELBO, CertaintyForcing, MaskConsistency, SharpenedKL, StepHalving or DiffusionForcing.
        decoding: how the trained model decodes.
        evaluate: how decoding is measured at the end.
    """

    objective: Objective = field(default_factory=MaskedELBO)
    decoding: DecodingArguments = field(default_factory=DecodingArguments)
    evaluate: DiffusionMeasureArguments = field(default_factory=DiffusionMeasureArguments)


class DiffusionRun(Run):
    """A run of ``kdlib diffusion``."""

    command, description, arguments_class = "diffusion", DESCRIPTION, DiffusionArguments
    arguments: DiffusionArguments
    args: DiffusionConfig

    @classmethod
    def config_class(cls) -> type[DistillationConfig]:
        from kdlib.trainers import DiffusionConfig

        return DiffusionConfig

    def make_trainer(self, **given: Any) -> DistillationTrainer:
        from kdlib.trainers import DiffusionDistillationTrainer, DiffusionTrainer

        kind = DiffusionTrainer if isinstance(self.arguments.objective, MaskedELBO) else DiffusionDistillationTrainer
        trainer = kind(self.arguments.model, self.arguments.teacher, **given)
        self._decoder = self._decoder_for(trainer.spec)
        check_room(self._decoder.gen_length, trainer.model)
        trainer.set_decoder(self._decoder)
        return trainer

    def _decoder_for(self, spec: DiffusionSpec) -> DiffusionDecoder:
        """How the trained model decodes; a strategy that does not exist is refused before it is trained."""
        from kdlib.decoding.diffusion_decoder import DiffusionDecoder
        from kdlib.decoding.strategies import strategy_of

        d = self.arguments.decoding
        decoder = DiffusionDecoder(
            gen_length=d.gen_length or self.args.response_length or 256,
            block_length=d.block_length or self.args.blocks(spec),
            strategy=strategy_of(d.strategy),
            temperature=d.temperature,
            cache=d.cache,
            seed=self.args.seed,
        )
        decoder.check()
        return decoder

    def measure(self, trainer: DistillationTrainer) -> Sequence[Section]:
        """Decoding of the model as it was and as it lies in final.tmp, into eval/diffusion.json and the report."""
        from kdlib.eval.diffusion_report import diffusion_sections

        if not self.arguments.evaluate.limit:
            return ()
        try:
            found = self._measured(trainer)
        except ValueError as error:  # prompts without room: no reason to lose what was trained
            print_unmeasured(self.log, "forwards are", str(error))
            return ()
        self.directory.write_json("eval/diffusion.json", found.to_json())
        return diffusion_sections(found)

    def _measured(self, trainer: DistillationTrainer) -> DiffusionSweep:
        from kdlib.data import prompt_ids
        from kdlib.decoding.sampling import context_length
        from kdlib.eval import diffusion

        options, decoder = self.arguments.evaluate, self._decoder
        context = context_length(trainer.model)
        return diffusion(
            str(self.directory.path / "final.tmp"),
            base=self._base(),
            prompts=row_prompts(trainer, prompt_ids, limit=options.limit, max_new_tokens=decoder.gen_length, context=context),
            gen_length=decoder.gen_length,
            block_length=decoder.block_length,
            batch_size=options.batch_size,
            seed=self.args.seed,
        )

    def _base(self) -> str | None:
        """The model that training started from, where it decoded as the trained one does."""
        from kdlib.diffusion.known import known_spec
        from kdlib.models import load_config

        was = None if self.args.from_scratch else known_spec(load_config(self.arguments.model))
        return None if was is None else self.arguments.model

    def next_command(self) -> str:
        base = self._base()
        compared = "" if base is None else f" --base {base}"
        return f"kdlib evaluate diffusion --model {self.directory.final}{compared} --tasks TASK"


def check_room(gen_length: int, model: Any) -> None:
    """ValueError for answers that fill the model's context: no prompt would fit, now or when it is served."""
    from kdlib.decoding.sampling import context_length

    if gen_length >= (context := context_length(model)):
        raise ValueError(
            f"decoding.gen_length {gen_length} leaves no room for a prompt in the model's {context:.0f} tokens: lower it "
            "(--decoding.gen_length)"
        )


def run(words: list[str], *, quiet: bool = False) -> int:
    """The exit code; ``quiet`` leaves out the lines about the run."""
    return DiffusionRun.run(words, quiet=quiet)

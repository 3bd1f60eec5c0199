"""``kdlib trajectories diffusion``: prompts in, a diffusion model's verified answers and the order of their tokens out."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from kdlib.cli.parsing import check_least, parse
from kdlib.cli.shards import say_start
from kdlib.cli.stoppable import run_stoppable
from kdlib.cli.trajectories import SAME, TrajectoriesArguments
from kdlib.samplers.config import RolloutConfig

if TYPE_CHECKING:
    from kdlib.cli.generation.source import Source
    from kdlib.data.diffusion import DiffusionWriter
    from kdlib.data.traces import Prompts
    from kdlib.decoding import DiffusionDecoder
    from kdlib.diffusion import DiffusionSpec

DESCRIPTION = """Lets a diffusion language model answer prompts, by default one token in each forward pass, and keeps the
answers that a verifier finds right, with the step in which each token was committed. kdlib diffusion trains on them.

A wrong answer is drawn again at the next temperature, attempts times, then dropped and counted. The same command again
continues where it was stopped; --overwrite true starts anew."""

SAME_DIFFUSION = (*SAME, "verify", "answer_column", "attempts", "temperatures", "keep", "keep_unfinished")


@dataclass
class DiffusionTrajectoriesArguments(TrajectoriesArguments):
    """Who answers which prompts, how it decodes, and what is kept.

    Args:
        model: the teacher, a diffusion language model: a path or Hub id.
        gen_length: tokens of a response, with what fills it behind its end.
        block_length: tokens of a block; blocks are finished from left to right. The model's own when left out, else 32.
        strategy: which tokens a pass commits, Name or {Name: {option: value}}; the most confident one when left out
            ({LowConfidence: {steps: gen_length}}).
        cache: what passes reuse of earlier ones: prefix, dual, free or block; nothing when left out, which is exact.
        verify: exact_number, math-verify, or file.py:function of (completion, row); every answer is right when left out.
        answer_column: where a row has its reference answer.
        attempts: how often a prompt is answered until the answer is right.
        temperatures: of the first attempt, the second, and so on; the last one of all further ones.
        keep: correct drops a prompt without a right answer; all keeps its first answer that ends.
        keep_unfinished: keep answers that do not end within gen_length too; they teach no end.
        rows_per_shard: prompts in a file; what a killed run does again, at most.
        seed: of the draws; a draw depends on it, the prompt and the number of the attempt alone.
    """

    gen_length: int = 256
    block_length: int | None = None
    strategy: Any = None
    cache: Literal["prefix", "dual", "free", "block"] | None = None
    verify: str | None = None
    answer_column: str = "answer"
    attempts: int = 5
    temperatures: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.2, 0.3, 0.4])
    keep: Literal["correct", "all"] = "correct"
    keep_unfinished: bool = False
    rows_per_shard: int = 100
    rollout: RolloutConfig = field(init=False, default_factory=RolloutConfig)  # of engines; the model is in this process

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, dict.fromkeys(("gen_length", "block_length", "attempts"), 1))
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures {self.temperatures}: give at least one, each 0 or more")
        if 0 in self.schedule[1:]:
            raise ValueError(
                f"temperature 0 writes the same answer every time: of {self.attempts} attempts at temperatures "
                f"{self.temperatures} only the first can have it; lower attempts, or raise the others"
            )

    @property
    def schedule(self) -> list[float]:
        """The temperature of each attempt."""
        return [self.temperatures[min(attempt, len(self.temperatures) - 1)] for attempt in range(self.attempts)]


def run(words: list[str]) -> int:
    options = parse("trajectories diffusion", DESCRIPTION, [DiffusionTrajectoriesArguments], words)
    if options is None:
        return 0
    arguments = options.build(DiffusionTrajectoriesArguments)
    return run_stoppable(lambda: _written(arguments))


def _written(a: DiffusionTrajectoriesArguments) -> int:
    """The exit code. Rows, prompts, directory and verifier are checked before a model is loaded."""
    from kdlib.cli.generation.verify import load_verifier
    from kdlib.cli.trajectory.diffusion_loop import Answering, shown
    from kdlib.cli.trajectory.diffusion_report import check_kept, facts, next_command
    from kdlib.cli.trajectory.report import summary_table
    from kdlib.cli.trajectory.rows import prompts_of, write_shards
    from kdlib.diffusion import check_diffusion

    source, spec = _source(a)
    decoder = _decoder(a, spec)
    prompts = prompts_of(a, source, answer=a.gen_length)
    with ExitStack() as stack:
        columns = prompts.rows.column_names
        verifier = load_verifier(a.verify, answer_column=a.answer_column, columns=columns, stack=stack)
        writer = _writer(a, prompts, source, decoder=decoder)
        stack.callback(writer.close)
        say_start(prompts, writer, each="" if verifier is None else f"up to {a.attempts} attempts each")
        if writer.missing:
            model = source.load(a)
            check_diffusion(model, spec)
            answering = Answering(arguments=a, source=source, model=model, spec=spec, decoder=decoder, verifier=verifier)
            write_shards(prompts, writer, answering, shown=shown)
    console = Console(soft_wrap=True, highlight=False)
    console.print(summary_table(prompts, facts(writer.index.summary)))
    check_kept(writer.index.summary, directory=a.output_dir)
    console.print(next_command(a, checkpoint=source.checkpoint, decoder=decoder), markup=False)
    return 0


def _source(a: DiffusionTrajectoriesArguments) -> tuple[Source, DiffusionSpec]:
    """The teacher, not loaded yet; ValueError where it is no diffusion model, and where its context has no room."""
    from kdlib.cli.generation.source import source_of
    from kdlib.decoding.sampling import context_length
    from kdlib.diffusion import spec_of
    from kdlib.models import load_config
    from kdlib.serving.client import is_url

    if is_url(a.model):
        raise ValueError(f"{a.model}: a diffusion model decodes in this process, give its path or Hub id")
    source = source_of(a, loaded=True)
    config = load_config(source.checkpoint, trust_remote_code=a.trust_remote_code)
    spec, context = spec_of(config), context_length(SimpleNamespace(config=config))
    if context <= a.gen_length:
        raise ValueError(f"gen_length {a.gen_length} leaves no room for a prompt in the model's {context} tokens")
    ends = set(source.stop_ids) | ({spec.eos_token_id} if spec.eos_token_id is not None else set())
    known = None if context == float("inf") else int(context)
    return replace(source, stop_ids=tuple(sorted(ends)), context=known), spec


def _decoder(a: DiffusionTrajectoriesArguments, spec: DiffusionSpec) -> DiffusionDecoder:
    """The decoder of the first attempt; ValueError for options out of range."""
    from kdlib.decoding import DiffusionDecoder
    from kdlib.decoding.strategies import strategy_of
    from kdlib.diffusion.spec import block_length_of

    decoder = DiffusionDecoder(
        gen_length=a.gen_length,
        block_length=block_length_of(spec, asked=a.block_length),
        strategy=strategy_of({"LowConfidence": {"steps": a.gen_length}} if a.strategy is None else a.strategy),
        cache=a.cache,
    )
    decoder.check()
    return decoder


def _writer(
    a: DiffusionTrajectoriesArguments, prompts: Prompts, source: Source, *, decoder: DiffusionDecoder
) -> DiffusionWriter:
    from kdlib.cli.generation.verify import verifier_fingerprint
    from kdlib.cli.trajectory.rows import revision
    from kdlib.data.diffusion import DiffusionWriter

    of_model = {name: value for name, value in source.settings.items() if not name.startswith("rollout.")}
    decoding = {name: value for name, value in decoder.to_json().items() if name not in ("temperature", "seed")}
    same = {name: getattr(a, name) for name in SAME_DIFFUSION}
    contents = {"revision": revision(source.checkpoint), "prompts": prompts.fingerprint}
    return DiffusionWriter(
        a.output_dir,
        of_model | decoding | same | contents | {"verifier_file": verifier_fingerprint(a.verify)},
        prompts=len(prompts),
        rows_per_shard=a.rows_per_shard,
        overwrite=a.overwrite,
    )

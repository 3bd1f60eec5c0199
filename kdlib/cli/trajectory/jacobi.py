"""``kdlib trajectories jacobi``: prompts in, greedy outputs and the Jacobi states of all their blocks out."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from rich.console import Console

from kdlib.cli.parsing import check_least, parse
from kdlib.cli.shards import say_start
from kdlib.cli.stoppable import run_stoppable
from kdlib.cli.trajectories import SAME, TrajectoriesArguments
from kdlib.samplers.config import RolloutConfig

if TYPE_CHECKING:
    from kdlib.cli.generation.source import Source
    from kdlib.data.traces import Prompts
    from kdlib.data.trajectories import TrajectoryWriter

DESCRIPTION = """Writes what Jacobi decoding of a model goes through: its greedy output for each prompt, and for every block of
that output the states from the first guess to the block itself. kdlib jacobi trains on them.

All blocks of a batch are iterated in the same forward passes, block_size of them at most. Only what a state changes is
stored. The same command again continues where it was stopped; --overwrite true starts anew."""

SAME_JACOBI = (*SAME, "block_size", "init", "completions", "max_completion_length", "max_repeat")
AT_LEAST = {"block_size": 2, "max_repeat": 2, "max_completion_length": 1, "generation_batch_size": 1}


@dataclass
class JacobiTrajectoriesArguments(TrajectoriesArguments):
    """Whose trajectories, of which prompts, in blocks of what size.

    Args:
        model: the model that is to be trained: a path, a Hub id, or the URL of a vLLM server of one that is here too.
        block_size: tokens of a block; the first of them is known, the others are guessed and iterated.
        init: the first guess: prompt repeats the prompt's tokens in order, random draws from them, last repeats the known one.
        completions: greedy lets the model write; dataset takes the rows' own completions, of which only blocks that are
            the model's greedy choice are kept.
        max_completion_length: new tokens of an output; one that is cut there has no end.
        rollout: the engine that writes the greedy outputs; temperature, top_p and top_k stay as they are.
        max_repeat: drop a row whose output has one token this often in a row; null keeps all.
        generation_batch_size: outputs asked for at once.
        batch_size: rows whose blocks are iterated together.
        seed: of init random; a draw depends on it and the prompt alone.
    """

    block_size: int = 16
    init: Literal["prompt", "random", "last"] = "prompt"
    completions: Literal["greedy", "dataset"] = "greedy"
    max_completion_length: int = 512
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    max_repeat: int | None = 10
    generation_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, AT_LEAST)
        if self.rollout.temperature not in (0.0, 1.0) or self.rollout.top_p < 1 or self.rollout.top_k:
            raise ValueError("rollout.temperature, top_p and top_k: the output is always the greedy one, leave them out")
        self.rollout = replace(self.rollout, temperature=0.0)


def run(words: list[str]) -> int:
    options = parse("trajectories jacobi", DESCRIPTION, [JacobiTrajectoriesArguments], words)
    if options is None:
        return 0
    arguments = options.build(JacobiTrajectoriesArguments)
    return run_stoppable(lambda: _written(arguments))


def _written(a: JacobiTrajectoriesArguments) -> int:
    """The exit code. Rows, prompts and directory are checked before a model is loaded."""
    from kdlib.cli.generation.source import source_of
    from kdlib.cli.trajectory.jacobi_loop import Tracer, shown
    from kdlib.cli.trajectory.jacobi_report import facts, next_command
    from kdlib.cli.trajectory.report import summary_table
    from kdlib.cli.trajectory.rows import prompts_of, write_shards
    from kdlib.models import check_streams

    source = source_of(a, loaded=True)
    prompts = prompts_of(a, source)
    with ExitStack() as stack:
        writer = _writer(a, prompts, source)
        stack.callback(writer.close)
        say_start(prompts, writer)
        if writer.missing:
            model = source.load(a)
            check_streams(model, role="model")
            sampler = source.sampler(a, model=model) if a.completions == "greedy" else None
            if sampler is not None:
                stack.callback(sampler.close)
            tracer = Tracer(arguments=a, source=source, model=model, sampler=sampler)
            write_shards(prompts, writer, tracer, shown=shown)
    console = Console(soft_wrap=True, highlight=False)
    console.print(summary_table(prompts, facts(writer.index.summary)))
    console.print(next_command(a, checkpoint=source.checkpoint), markup=False)
    return 0


def _writer(a: JacobiTrajectoriesArguments, prompts: Prompts, source: Source) -> TrajectoryWriter:
    from kdlib.cli.trajectory.rows import revision
    from kdlib.data.trajectories import TrajectoryWriter

    same = {name: getattr(a, name) for name in SAME_JACOBI}
    contents = {"revision": revision(source.checkpoint), "prompts": prompts.fingerprint}
    return TrajectoryWriter(
        a.output_dir,
        source.settings | same | contents,
        prompts=len(prompts),
        rows_per_shard=a.rows_per_shard,
        overwrite=a.overwrite,
    )

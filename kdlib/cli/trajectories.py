"""``kdlib trajectories jacobi``: prompts in, greedy outputs and the Jacobi states of all their blocks out."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from kdlib.cli.parsing import check_least, parse
from kdlib.cli.shards import say_start
from kdlib.cli.stoppable import run_stoppable
from kdlib.samplers.config import RolloutConfig

if TYPE_CHECKING:
    from kdlib.cli.generate_source import Source
    from kdlib.data.traces import Prompts
    from kdlib.data.trajectories import TrajectoryWriter

DESCRIPTION = """Writes what Jacobi decoding of a model goes through: its greedy output for each prompt, and for every block of
that output the states from the first guess to the block itself. kdlib jacobi trains on them.

All blocks of a batch are iterated in the same forward passes, block_size of them at most. Only what a state changes is
stored. The same command again continues where it was stopped; --overwrite true starts anew."""

# What the trajectories depend on, beside the model and the prompts: none of it may change when a run is continued.
SAME: tuple[str, ...] = ("block_size", "init", "completions", "max_completion_length", "max_repeat", "rows_per_shard")
SAME += ("dtype", "attn_implementation", "load_in_8bit", "load_in_4bit", "seed")
AT_LEAST = {"block_size": 2, "max_repeat": 2}
COUNTS = ("max_completion_length", "rows_per_shard", "generation_batch_size", "batch_size", "max_prompt_length", "limit")


@dataclass
class TrajectoriesArguments:
    """Whose trajectories, of which prompts, in blocks of what size.

    Args:
        model: the model that is to be trained: a path, a Hub id, or the URL of a vLLM server of one that is here too.
        dataset_name: rows with a prompt (text or messages), messages, a question, or input_ids and labels; files, a glob or
            a Hub id.
        output_dir: the directory to write.
        block_size: tokens of a block; the first of them is known, the others are guessed and iterated.
        init: the first guess: prompt repeats the prompt's tokens in order, random draws from them, last repeats the known one.
        completions: greedy lets the model write; dataset takes the rows' own completions, of which only blocks that are
            the model's greedy choice are kept.
        max_completion_length: new tokens of an output; one that is cut there has no end.
        rollout: the engine that writes the greedy outputs; temperature, top_p and top_k stay as they are.
        max_repeat: drop a row whose output has one token this often in a row; null keeps all.
        dataset_config: configuration name of a Hub dataset.
        dataset_train_split: split of the rows.
        limit: use only the first rows.
        tokenizer: path or Hub id of the tokenizer; the model's own, or that of the checkpoint a server names.
        apply_chat_template: put prompts that are text into a user turn; null does so where there is a chat template.
        chat_template_kwargs: passed to the chat template, for example {enable_thinking: true}.
        max_prompt_length: prompts of more tokens are skipped; the model's context when left out.
        rows_per_shard: prompts in a file; what a killed run does again, at most.
        generation_batch_size: outputs asked for at once.
        batch_size: rows whose blocks are iterated together.
        dtype: the weights, auto (as saved), float32 or bfloat16.
        attn_implementation: sdpa, eager or flex_attention.
        load_in_8bit: load the model in 8 bits (needs bitsandbytes).
        load_in_4bit: load the model in 4 bits (needs bitsandbytes).
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
        device: cpu, cuda or cuda:N; chosen when left out.
        seed: of init random; a draw depends on it and the prompt alone.
        overwrite: delete the trajectories in output_dir and start anew.
    """

    model: str
    dataset_name: str
    output_dir: str
    block_size: int = 16
    init: Literal["prompt", "random", "last"] = "prompt"
    completions: Literal["greedy", "dataset"] = "greedy"
    max_completion_length: int = 512
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    max_repeat: int | None = 10
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    limit: int | None = None
    tokenizer: str | None = None
    apply_chat_template: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_prompt_length: int | None = None
    rows_per_shard: int = 500
    generation_batch_size: int = 64
    batch_size: int = 8
    dtype: str = "auto"
    attn_implementation: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    device: str | None = None
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_least(self, dict.fromkeys(COUNTS, 1) | AT_LEAST)
        if self.rollout.temperature not in (0.0, 1.0) or self.rollout.top_p < 1 or self.rollout.top_k:
            raise ValueError("rollout.temperature, top_p and top_k: the output is always the greedy one, leave them out")
        self.rollout = replace(self.rollout, temperature=0.0)


def run(words: list[str]) -> int:
    if words[:1] != ["jacobi"] and not {"-h", "--help", "--help_all"} & set(words):
        raise ValueError("say which trajectories: kdlib trajectories jacobi --model MODEL --dataset_name ROWS --output_dir DIR")
    options = parse("trajectories jacobi", DESCRIPTION, [TrajectoriesArguments], [w for w in words if w != "jacobi"])
    if options is None:
        return 0
    arguments = options.build(TrajectoriesArguments)
    return run_stoppable(lambda: _written(arguments))


def _written(a: TrajectoriesArguments) -> int:
    """The exit code. Rows, prompts and directory are checked before a model is loaded."""
    from kdlib.cli.generate_source import source_of
    from kdlib.cli.trajectories_loop import Tracer, write_shards
    from kdlib.cli.trajectories_report import next_command, summary_table
    from kdlib.cli.trajectories_rows import prompts_of
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
            write_shards(prompts, writer, Tracer(arguments=a, source=source, model=model, sampler=sampler))
    console = Console(soft_wrap=True, highlight=False)
    console.print(summary_table(writer.index, prompts))
    console.print(next_command(a, checkpoint=source.checkpoint), markup=False)
    return 0


def _writer(a: TrajectoriesArguments, prompts: Prompts, source: Source) -> TrajectoryWriter:
    from kdlib.cli.trajectories_rows import revision
    from kdlib.data.trajectories import TrajectoryWriter

    same = {name: getattr(a, name) for name in SAME}
    contents = {"revision": revision(source.checkpoint), "prompts": prompts.fingerprint}
    return TrajectoryWriter(
        a.output_dir,
        source.settings | same | contents,
        prompts=len(prompts),
        rows_per_shard=a.rows_per_shard,
        overwrite=a.overwrite,
    )

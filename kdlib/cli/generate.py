"""``kdlib generate``: prompts in, a teacher's verified answers out, in shards that train as they are."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kdlib.cli.hub.arguments import DataHubArguments
from kdlib.cli.parsing import check_least, parse
from kdlib.cli.shards import say_start
from kdlib.cli.stoppable import run_stoppable
from kdlib.samplers.config import RolloutConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from kdlib.cli.generation.source import Source
    from kdlib.data.traces import Prompts, TraceWriter
    from kdlib.verifiers import Verifier

DESCRIPTION = """Lets a teacher answer prompts: several completions each, verified, without duplicates, kept as the exact
token ids it wrote.

The same command again continues where it was stopped; --overwrite true starts anew."""

# What the traces depend on, beside the teacher and the prompts: none of it may change when a run is continued.
SAME: tuple[str, ...] = (
    "num_generations",
    "max_completion_length",
    "verify",
    "answer_column",
    "rows_per_shard",
    "generation_batch_size",
)
SAME += ("dtype", "attn_implementation", "load_in_8bit", "load_in_4bit", "seed")
COUNTS = ("num_generations", "max_completion_length", "rows_per_shard", "generation_batch_size", "max_prompt_length")


@dataclass
class GenerateArguments:
    """Who answers which prompts, how often, and what counts as right.

    Args:
        model: the teacher: a path, a Hub id, or the URL of a vLLM server.
        dataset_name: rows with a prompt (text or messages), messages, or a question; files, a glob or a Hub id.
        output_dir: the directory to write.
        num_generations: completions drawn for each prompt.
        max_completion_length: new tokens of a completion; one that is cut there does not end, and is not taught to.
        verify: exact_number, math-verify, or file.py:function of (completion, row); nothing is judged when left out.
        answer_column: where a row has its reference answer.
        rollout: the engine, and how it samples.
        dataset_config: configuration name of a Hub dataset.
        dataset_train_split: split of the rows.
        tokenizer: path or Hub id of the tokenizer; the model's own, or that of the checkpoint a server names.
        apply_chat_template: put prompts that are text into a user turn; null does so where there is a chat template.
        chat_template_kwargs: passed to the chat template, for example {enable_thinking: true}.
        max_prompt_length: prompts of more tokens are skipped; the model's context when left out.
        rows_per_shard: prompts in a file.
        generation_batch_size: completions asked for at once; what a killed run does again, at most.
        dtype: the teacher's weights, auto (as saved), float32 or bfloat16.
        attn_implementation: sdpa, eager, flash_attention_2 or another of transformers; engine hf.
        load_in_8bit: load the teacher in 8 bits (needs bitsandbytes); engine hf.
        load_in_4bit: load the teacher in 4 bits (needs bitsandbytes); engine hf.
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
        device: cpu, cuda or cuda:N; chosen when left out; engine hf.
        seed: of the draws; a draw depends on it, the prompt and the number of the completion alone.
        overwrite: delete the traces in output_dir and start anew.
    """

    model: str
    dataset_name: str
    output_dir: str
    num_generations: int = 4
    max_completion_length: int = 1024
    verify: str | None = None
    answer_column: str = "answer"
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    tokenizer: str | None = None
    apply_chat_template: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_prompt_length: int | None = None
    rows_per_shard: int = 1000
    generation_batch_size: int = 256
    dtype: str = "auto"
    attn_implementation: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    device: str | None = None
    seed: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_least(self, dict.fromkeys(COUNTS, 1))
        if self.rollout.temperature == 0 and self.num_generations > 1:
            raise ValueError("rollout.temperature 0 writes the same completion every time: add --num_generations 1")


def run(words: list[str]) -> int:
    options = parse("generate", DESCRIPTION, [GenerateArguments, DataHubArguments], words)
    if options is None:
        return 0
    arguments, hub = options.build(GenerateArguments), options.build(DataHubArguments)
    hub.check(arguments.model)

    def generated_and_pushed() -> int:
        code = _generated(arguments)
        for line in hub.push(Path(arguments.output_dir)):
            Console(soft_wrap=True, highlight=False).print(line, markup=False)
        return code

    return run_stoppable(generated_and_pushed)


def _generated(a: GenerateArguments) -> int:
    """The exit code. Rows, prompts, directory and verifier are checked before a model is loaded."""
    from kdlib.cli.generation.source import source_of
    from kdlib.cli.generation.verify import load_verifier
    from kdlib.data import load_rows

    with ExitStack() as stack:
        rows = load_rows(a.dataset_name, split=a.dataset_train_split, config=a.dataset_config)
        verifier = load_verifier(a.verify, answer_column=a.answer_column, columns=rows.column_names, stack=stack)
        prompts, writer = answered(a, rows, source=source_of(a), verifier=verifier, stack=stack)
        return _closing(a, prompts, writer)


def answered(
    a: GenerateArguments,
    rows: Dataset,
    *,
    source: Source,
    verifier: Verifier | None,
    stack: ExitStack,
    more: Mapping[str, Any] | None = None,
) -> tuple[Prompts, TraceWriter]:
    """The rows' prompts and the directory of their traces, all written: what is not there yet is generated.

    ``stack`` closes the directory. ``more``: further settings that the traces depend on.
    """
    from kdlib.cli.generation.loop import Generator, answer

    prompts = _prompts(a, rows, source)
    writer = _writer(a, prompts, source, more=more or {})
    stack.callback(writer.close)
    say_start(prompts, writer, each=f"{a.num_generations} completions each")
    if writer.missing:
        with closing(source.sampler(a)) as sampler:
            answer(prompts, writer, Generator(arguments=a, source=source, sampler=sampler, verifier=verifier))
    return prompts, writer


def _prompts(a: GenerateArguments, rows: Dataset, source: Source) -> Prompts:
    from kdlib.data.traces import read_prompts

    longest = [limit for limit in (a.max_prompt_length, source.longest_prompt) if limit is not None]
    return read_prompts(
        rows,
        source.tokenizer,
        longest=min(longest, default=None),
        apply_chat_template=a.apply_chat_template,
        chat_template_kwargs=a.chat_template_kwargs,
    )


def _writer(a: GenerateArguments, prompts: Prompts, source: Source, *, more: Mapping[str, Any]) -> TraceWriter:
    from kdlib.cli.generation.verify import verifier_fingerprint
    from kdlib.data.traces import TraceWriter

    contents = {"prompts": prompts.fingerprint, "verifier_file": verifier_fingerprint(a.verify), **more}
    return TraceWriter(
        a.output_dir,
        source.settings | {name: getattr(a, name) for name in SAME} | contents,
        prompts=len(prompts),
        rows_per_shard=a.rows_per_shard,
        prompts_per_batch=max(1, a.generation_batch_size // a.num_generations),
        overwrite=a.overwrite,
    )


def _closing(a: GenerateArguments, prompts: Prompts, writer: TraceWriter) -> int:
    """Correct and incorrect traces in files of their own, the report, and what to do with them."""
    from kdlib.cli.generation.report import closing_lines, finished, summary_table

    report = finished(writer.directory, prompts=prompts, verified=a.verify is not None)
    console = Console(soft_wrap=True, highlight=False)
    console.print(summary_table(report))
    for line in closing_lines(writer.directory, report, shards=writer.index.n_shards):
        console.print(line, markup=False)
    return 0

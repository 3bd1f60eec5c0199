"""``kdlib evaluate diffusion``: what fewer forward passes of a diffusion language model cost in accuracy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from kdlib.cli.measuring import compared_tokenizer, loaded, print_findings, write_result
from kdlib.cli.parsing import check_least, parse

if TYPE_CHECKING:
    from kdlib.eval import DiffusionSweep

DESCRIPTION = """Measures how a diffusion language model decodes: accuracy of lm-eval tasks, forward passes per answer, tokens
per forward pass and per second, for every strategy of --strategies, and AUP, the area under accuracy over tokens per forward.

--base MODEL measures the model before training in the same ways. One token per step, {LowConfidence: {steps: GEN_LENGTH}}, is
what others are compared with: have it among the strategies. --prompts without tasks counts passes and tokens alone;
--dataset_name gives a bound on bits per byte.

With --output_path every point is kept as soon as it is known: the same command continues where it was stopped."""


@dataclass
class DiffusionArguments:
    """Which models, on what.

    Args:
        model: a diffusion language model, a path or Hub id.
        base: the model before training, measured in the same ways; it has the same tokenizer.
        tasks: lm-eval tasks that generate, names or YAML files.
        prompts: rows with a prompt, messages, a question or turns (the first is used), decoded without being scored.
        dataset_name: rows for a bound on bits per byte, as for kdlib distill.
        output_path: directory for diffusion.json, diffusion.html and points/.
        batch_size: answers decoded at once.
        limit: score only this many problems per task, or below 1 this share of them.
        prompt_limit: use only the first rows of prompts.
        num_fewshot: examples in the prompt of a task.
        include_path: directory with YAML tasks of your own.
        metric: which of a task's scores is the accuracy, exact_match or exact_match,flexible-extract; the first when left out.
        apply_chat_template: render prompts with the chat template; null does so for prompts where there is one, not for tasks.
        dataset_split: split of the prompts.
        dataset_test_split: split of the rows of dataset_name.
        max_length: rows of dataset_name longer than this keep their first max_length tokens.
        mc_samples: random masks of each row of dataset_name.
        resamples: of the bootstrap over answers.
        dtype: of the weights, auto (as saved), float32 or bfloat16.
        attn_implementation: sdpa, eager, flash_attention_2 or another of transformers.
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
        device: cpu, cuda or cuda:N; chosen when left out.
    """

    model: str
    base: str | None = None
    tasks: list[str] | None = None
    prompts: str | None = None
    dataset_name: str | None = None
    output_path: str | None = None
    batch_size: int = 8
    limit: int | float | None = None
    prompt_limit: int | None = None
    num_fewshot: int | None = None
    include_path: str | None = None
    metric: str | None = None
    apply_chat_template: bool | None = None
    dataset_split: str = "train"
    dataset_test_split: str = "train"
    max_length: int = 1024
    mc_samples: int = 32
    resamples: int = 2000
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        check_least(self, dict.fromkeys(("batch_size", "prompt_limit", "mc_samples"), 1))


@dataclass
class SweepArguments:
    """How both models decode; what is left out is the model's own setting, or the preset's.

    Args:
        strategies: [Name, {Name: {option: value}}, ...], a list of values stands for one strategy each; left out, the model's
            own and one token per step.
        preset: published settings, llada, dream, dparallel or fast-dllm.
        gen_length: the most tokens of an answer, whatever the task says.
        block_length: tokens that are decoded together.
        cache: prefix, dual, free or, with block-causal attention, block, which is exact; none reads everything in each pass.
        temperature: above 0, tokens are drawn, whatever the task says.
        seed: of the draws; an answer's depend on it and the prompt alone.
    """

    strategies: list[Any] | None = None
    preset: str | None = None
    gen_length: int | None = None
    block_length: int | None = None
    cache: str | None = None
    temperature: float | None = None
    seed: int = 0


def run(words: list[str]) -> int:
    options = parse("evaluate diffusion", DESCRIPTION, [DiffusionArguments, SweepArguments], words)
    if options is None:
        return 0
    a, sweep = options.build(DiffusionArguments), options.build(SweepArguments)
    _show(a, _measured(a, sweep))
    return 0


def _measured(a: DiffusionArguments, sweep: SweepArguments) -> DiffusionSweep:
    from kdlib.data import load_rows
    from kdlib.eval import diffusion

    if not (a.tasks or a.prompts or a.dataset_name):
        raise ValueError("nothing to measure: add --tasks TASK, --prompts FILE, or --dataset_name FILE for bits per byte")
    prompts = load_rows(a.prompts, split=a.dataset_split, limit=a.prompt_limit) if a.prompts else None
    rows = load_rows(a.dataset_name, split=a.dataset_test_split) if a.dataset_name else None
    return diffusion(
        a.model,
        base=a.base,
        tasks=a.tasks or (),
        prompts=prompts,
        rows=rows,
        tokenizer=compared_tokenizer(a),
        batch_size=a.batch_size,
        limit=a.limit,
        num_fewshot=a.num_fewshot,
        apply_chat_template=a.apply_chat_template,
        include_path=a.include_path,
        metric=a.metric,
        mc_samples=a.mc_samples,
        max_length=a.max_length,
        output_path=a.output_path,
        resamples=a.resamples,
        load=partial(loaded, a),
        **vars(sweep),
    )


def _show(a: DiffusionArguments, sweep: DiffusionSweep) -> None:
    """Tables and findings on stdout; JSON and a page where asked for."""
    from kdlib.eval.diffusion_report import diffusion_lines, diffusion_tables, write_diffusion_page

    console = Console(soft_wrap=True, highlight=False)
    for table in diffusion_tables(sweep):
        console.print(table)
    print_findings(console, diffusion_lines(sweep))
    if a.output_path:
        directory = Path(a.output_path)
        data = write_result(directory / "diffusion.json", sweep.to_json())
        page = write_diffusion_page(directory / "diffusion.html", sweep)
        console.print(f"written {data} and {page}", markup=False)

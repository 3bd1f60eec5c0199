"""``kdlib evaluate jacobi``: how many tokens a model gives per forward pass when it decodes blocks in parallel."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from kdlib.cli.evaluation.jacobi_costs import (
    CostArguments,
    Costs,
    Scorer,
    cost_lines,
    cost_sections,
    costs_json,
    score_columns,
)
from kdlib.cli.measuring import compared_tokenizer, loaded, print_findings, print_left_out, write_result
from kdlib.cli.parsing import check_least, parse

if TYPE_CHECKING:
    from kdlib.eval import JacobiResult

DESCRIPTION = """Measures Jacobi decoding: tokens per forward pass with intervals, by block, iterations of a block, tokens per
second against greedy decoding, and whether the tokens are those of greedy decoding.

A block of block_size tokens is guessed, and every pass corrects all of it, until nothing changes: the same tokens as one by
one, in fewer passes the better the model guesses ahead. A model that was never trained for it gives little more than 1 token
per forward; kdlib jacobi trains one that gives more. --base MODEL shows before and after on the same prompts; --tasks and
--dataset_name show what the training cost in accuracy and bits per byte.

Exit code 1: the tokens of a decoder that promises it are not those of greedy decoding."""


@dataclass
class JacobiArguments:
    """Which model, on what.

    Args:
        model: a path or Hub id.
        prompts: rows with a prompt, messages, a question or turns (the first is used).
        base: the model before training, measured on the same prompts; it has the same tokenizer.
        max_new_tokens: of a response.
        limit: use only the first rows of prompts.
        output_path: directory for jacobi.json and jacobi.html.
        batch_size: prompts decoded at once; timing has one.
        timing: measure tokens per second, Jacobi decoding and greedy decoding in turns.
        timing_prompts: how many prompts are timed.
        checks: compare with the tokens of greedy decoding.
        resamples: of the bootstrap over prompts.
        dataset_config: configuration name of a Hub dataset of prompts.
        dataset_split: split of the prompts.
        apply_chat_template: put prompts that are text into a user turn; null does so where there is a chat template. true also
            renders the prompts of tasks.
        chat_template_kwargs: passed to the chat template, for example {enable_thinking: true}.
        dtype: of the weights, auto (as saved), float32 or bfloat16; in 16 bits ties may be decided otherwise than by greedy
            decoding, and the check says so.
        attn_implementation: sdpa, eager, flash_attention_2 or another of transformers.
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
        device: cpu, cuda or cuda:N; chosen when left out.
    """

    model: str
    prompts: str
    base: str | None = None
    max_new_tokens: int = 128
    limit: int | None = None
    output_path: str | None = None
    batch_size: int = 8
    timing: bool = True
    timing_prompts: int = 8
    checks: bool = True
    resamples: int = 2000
    dataset_config: str | None = None
    dataset_split: str = "train"
    apply_chat_template: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    dtype: str = "auto"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    device: str | None = None

    def __post_init__(self) -> None:
        check_least(self, dict.fromkeys(("max_new_tokens", "batch_size", "limit", "timing_prompts"), 1))


@dataclass
class DecoderArguments:
    """How blocks are decoded.

    Args:
        block_size: tokens decoded in parallel; at most max_new_tokens.
        init: the first guess of a block: tokens of the prompt in their order, drawn from it (random), or the last known one.
        max_iterations: end a block after this many passes, right or not: faster, and no longer the tokens of greedy decoding.
        sliding_window: keep block_size guesses ahead at all times instead of finishing a block first.
        blocks: blocks iterated at once; the next one is begun when spawn_ratio of the one before is right.
        spawn_ratio: see blocks.
        pool: n-grams of earlier iterations that are tried again in each pass; 0 for none.
        seed: of init random; a prompt's numbers depend on it and the prompt alone.
    """

    block_size: int = 16
    init: Literal["prompt", "random", "last"] = "prompt"
    max_iterations: int | None = None
    sliding_window: bool = False
    blocks: int = 1
    spawn_ratio: float = 0.85
    pool: int = 0
    seed: int = 0


def run(words: list[str]) -> int:
    """0: measured, 1: measured, and a decoder that promises greedy decoding's tokens gave others."""
    options = parse("evaluate jacobi", DESCRIPTION, [JacobiArguments, DecoderArguments, CostArguments], words)
    if options is None:
        return 0
    a = options.build(JacobiArguments)
    results, found = _measured(a, options.build(DecoderArguments), options.build(CostArguments))
    _show(a, results, found)
    return 0 if all(result.passed for result in results.values()) else 1


def _measured(
    a: JacobiArguments, decoder: DecoderArguments, costs: CostArguments
) -> tuple[dict[str, JacobiResult], dict[str, Costs]]:
    """{name: ...}, the base first; rows, tasks and tokenizers are read before a model is loaded."""
    from kdlib.data import load_rows
    from kdlib.eval import jacobi
    from kdlib.eval.jacobi_decoder import JacobiDecoder

    JacobiDecoder(**asdict(decoder)).check(max_new_tokens=a.max_new_tokens)
    rows = load_rows(a.prompts, split=a.dataset_split, config=a.dataset_config, limit=a.limit)
    scorer = Scorer.of(costs, apply_chat_template=bool(a.apply_chat_template), batch_size=a.batch_size, decoder=asdict(decoder))
    tokenizer = compared_tokenizer(a)
    models = {Path(a.model).name: a.model} if a.base is None else {"base": a.base, "trained": a.model}
    results: dict[str, JacobiResult] = {}
    found: dict[str, Costs] = {}
    for name, path in models.items():
        model = loaded(a, path)
        earlier = next(iter(results.values()), None)
        results[name] = jacobi(
            model,
            rows if earlier is None else earlier.prompts,
            tokenizer=tokenizer,
            max_new_tokens=a.max_new_tokens,
            batch_size=a.batch_size,
            timing=a.timing,
            timing_prompts=a.timing_prompts,
            checks=a.checks,
            resamples=a.resamples,
            apply_chat_template=a.apply_chat_template,
            chat_template_kwargs=a.chat_template_kwargs,
            **asdict(decoder),
        )
        found[name] = scorer.costs(model, tokenizer)
    return results, found


def _show(a: JacobiArguments, results: dict[str, JacobiResult], found: dict[str, Costs]) -> None:
    """Tables and findings on stdout; JSON and a page where asked for."""
    from kdlib.eval import results_table
    from kdlib.eval.jacobi_report import change_of, jacobi_lines, jacobi_table, write_jacobi_page

    console = Console(soft_wrap=True, highlight=False)
    console.print(jacobi_table(results))
    print_findings(console, jacobi_lines(results))
    scores = score_columns(found)
    if scores:
        console.print(results_table(scores))
    for line in cost_lines(found):
        console.print(line, markup=False)
    *earlier, (name, result) = results.items()
    print_left_out(console, result.prompts)
    if a.output_path:
        directory = Path(a.output_path)
        content = result.to_json() | costs_json(found[name])
        for other, before in earlier:
            content[other] = before.to_json() | costs_json(found[other])
            content["change_of_tokens_per_forward"] = change_of(result, before).to_json()
        data = write_result(directory / "jacobi.json", content)
        page = write_jacobi_page(directory / "jacobi.html", results, more=cost_sections(found))
        console.print(f"written {data} and {page}", markup=False)

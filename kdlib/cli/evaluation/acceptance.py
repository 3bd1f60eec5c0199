"""``kdlib evaluate acceptance``: how much of a draft's work the target keeps, before anything is served."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from kdlib.cli.measuring import loaded, print_findings, print_left_out, write_result
from kdlib.cli.parsing import check_least, parse

if TYPE_CHECKING:
    from kdlib.eval import AcceptanceResult

DESCRIPTION = """Measures how often a target keeps what a draft proposes: expected acceptance with intervals, counted
acceptance of speculative decoding, speed with and without the draft, and whether the output is the target's.

With --server URL it measures a model that is served; kdlib evaluate acceptance --server URL --help shows how."""


@dataclass
class AcceptanceArguments:
    """Which draft, on what, and how requests are sampled.

    Args:
        target: the model that is served, a path or Hub id.
        draft: the draft, a path or Hub id with the target's tokenizer, or the directory of an EAGLE-3 head.
        prompts: rows with a prompt, messages, a question or turns (the first is used); domain or category is kept.
        num_speculative_tokens: draft tokens per round (gamma); several are measured one by one.
        temperature: of the request; 0 is greedy.
        top_k: of the request; 0 keeps everything.
        top_p: of the request.
        max_new_tokens: of a response.
        draft_sampling: how drafts are drawn when the request samples; greedy is vLLM's default.
        limit: use only the first rows.
        baseline_draft: another draft of the same target, to show before and after.
        output_path: directory for acceptance.json and acceptance.html.
        batch_size: prompts decoded at once; timing has one.
        timing: measure forward passes and tokens per second.
        timing_prompts: how many prompts are timed.
        checks: test that the output is the target's.
        resamples: of the bootstrap over prompts.
        dataset_config: configuration name of a Hub dataset.
        dataset_split: split of the rows.
        apply_chat_template: put prompts that are text into a user turn; null does so where there is a chat template.
        chat_template_kwargs: passed to the chat template, for example {enable_thinking: true}.
        dtype: of the weights, auto (as saved), float32 or bfloat16.
        attn_implementation: sdpa, eager, flash_attention_2 or another of transformers.
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
        device: cpu, cuda or cuda:N; chosen when left out.
        seed: of the draws; a draw depends on it and the prompt alone.
    """

    target: str
    draft: str
    prompts: str
    num_speculative_tokens: list[int] = field(default_factory=lambda: [2, 3, 5])
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    draft_sampling: Literal["both", "probabilistic", "greedy"] = "both"
    limit: int | None = None
    baseline_draft: str | None = None
    output_path: str | None = None
    batch_size: int = 32
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
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.num_speculative_tokens or min(self.num_speculative_tokens) < 1:
            raise ValueError(f"num_speculative_tokens must be at least 1, not {self.num_speculative_tokens}")
        check_least(self, dict.fromkeys(("max_new_tokens", "batch_size", "limit", "timing_prompts"), 1))


def run(words: list[str]) -> int:
    """0: measured, 1: measured, and the output is not the target's."""
    if any(word.partition("=")[0] == "--server" for word in words):
        from kdlib.cli.evaluation.served import run as run_served

        return run_served(words)
    options = parse("evaluate acceptance", DESCRIPTION, [AcceptanceArguments], words)
    if options is None:
        return 0
    a = options.build(AcceptanceArguments)
    results = _measured(a)
    _show(a, results)
    return 0 if all(result.passed for result in results.values()) else 1


def _measured(a: AcceptanceArguments) -> dict[str, AcceptanceResult]:
    """{draft's name: result}, the baseline first; rows and tokenizers are read before a model is loaded."""
    from kdlib.data import load_rows
    from kdlib.drafts.formats import is_head
    from kdlib.eval import acceptance
    from kdlib.eval.acceptance_expected import METHODS
    from kdlib.eval.acceptance_pair import check_tokenizers
    from kdlib.models import load_tokenizer

    rows = load_rows(a.prompts, split=a.dataset_split, config=a.dataset_config, limit=a.limit)
    tokenizer = load_tokenizer(a.target, trust_remote_code=a.trust_remote_code)
    drafts = [draft for draft in (a.baseline_draft, a.draft) if draft is not None]
    for draft in drafts:
        check_tokenizers(tokenizer, draft)
    target = loaded(a, a.target)
    results: dict[str, AcceptanceResult] = {}
    names = dict(zip(drafts, _names(drafts), strict=True))
    for draft in names:
        earlier = next(iter(results.values()), None)
        results[names[draft]] = acceptance(
            target,
            draft if is_head(draft) else loaded(a, draft),
            rows if earlier is None else earlier.prompts,
            responses=None if earlier is None else earlier.responses,
            tokenizer=tokenizer,
            gamma=a.num_speculative_tokens,
            temperature=a.temperature,
            top_k=a.top_k,
            top_p=a.top_p,
            max_new_tokens=a.max_new_tokens,
            batch_size=a.batch_size,
            seed=a.seed,
            draft_sampling=[method for method in METHODS if a.draft_sampling in ("both", method)],
            checks=a.checks,
            timing=a.timing,
            timing_prompts=a.timing_prompts,
            resamples=a.resamples,
            apply_chat_template=a.apply_chat_template,
            chat_template_kwargs=a.chat_template_kwargs,
        )
    return results


def _names(drafts: list[str]) -> list[str]:
    """The last parts of the paths, or the whole paths where those are the same."""
    short = [Path(draft).name or draft for draft in drafts]
    return short if len(set(short)) == len(drafts) else drafts


def _show(a: AcceptanceArguments, results: dict[str, AcceptanceResult]) -> None:
    """Tables and findings on stdout; JSON and a page where asked for."""
    from kdlib.eval.acceptance_change import changes
    from kdlib.eval.acceptance_report import lines, tables, write_acceptance_page

    console = Console(soft_wrap=True, highlight=False)
    for table in tables(results):
        console.print(table)
    print_findings(console, lines(results))
    result = list(results.values())[-1]
    print_left_out(console, result.prompts)
    if a.output_path:
        directory = Path(a.output_path)
        content = result.to_json()
        if a.baseline_draft:
            content["baseline"] = next(iter(results.values())).to_json()
            content["changes"] = [change.to_json() for change in changes(results)]
        data = write_result(directory / "acceptance.json", content)
        page = write_acceptance_page(directory / "acceptance.html", results)
        console.print(f"written {data} and {page}", markup=False)

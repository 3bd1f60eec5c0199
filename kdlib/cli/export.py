"""``kdlib export``: what training left, in the form that others serve."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from kdlib.cli.parsing import parse

USAGE = """usage: kdlib export draft --draft DIR --target DIR_OR_ID --output_path OUT [--OPTION VALUE ...]
       kdlib export diffusion --model DIR_OR_ID --output_path OUT [--OPTION VALUE ...]"""
DESCRIPTION = """Writes a draft for speculative decoding as a directory that vLLM loads, after the checks that
vLLM makes and those it does not, and prints what to type.

A causal language model becomes a draft of method draft_model; an EAGLE-3 head is written in the EAGLE or in the
speculators format."""
GREEDY = """vLLM drafts greedily here, also for requests that sample: a drafted token is then accepted with p(argmax q).
--draft_sample_method probabilistic draws it from the draft, and accepts with sum min(p, q)."""


@dataclass
class DraftExportArguments:
    """Which draft, for which target.

    Args:
        draft: the draft, a directory or Hub id.
        target: the model it drafts for, a directory or Hub id.
        output_path: the directory to write; one that holds an export of the same draft for the same target is replaced.
        format: hf for a causal language model, eagle or speculators for an EAGLE-3 head; left out, hf or speculators.
        num_speculative_tokens: tokens drafted in each round.
        draft_sample_method: how vLLM draws draft tokens for requests that sample.
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
    """

    draft: str
    target: str
    output_path: str
    format: Literal["hf", "eagle", "speculators"] | None = None
    num_speculative_tokens: int = 4
    draft_sample_method: Literal["greedy", "probabilistic"] = "greedy"
    trust_remote_code: bool = False


def run(words: list[str]) -> int:
    console = Console(soft_wrap=True, highlight=False)
    if not words or words[0] in ("-h", "--help"):
        console.print(USAGE, markup=False)
        return 0
    if words[0] == "diffusion":
        from kdlib.cli import export_diffusion

        return export_diffusion.run(words[1:])
    if words[0] != "draft":
        raise ValueError(USAGE)
    options = parse("export draft", DESCRIPTION, [DraftExportArguments], words[1:])
    if options is None:
        return 0
    a = options.build(DraftExportArguments)
    written = _export(a)
    lines = [
        f"{written.directory}: a draft for {written.target}",
        *written.notes,
        f"serve   {written.serve}",
        f"python  LLM({written.target!r}, speculative_config={written.speculative_config})",
        *([GREEDY] if written.speculative_config.get("draft_sample_method") == "greedy" else []),
    ]
    console.print("\n".join(lines), markup=False)
    return 0


def _export(a: DraftExportArguments) -> Any:
    from kdlib.drafts import export_draft, export_head
    from kdlib.drafts.formats import is_head

    head = is_head(a.draft) or a.format in ("eagle", "speculators")
    if head and a.format == "hf":
        raise ValueError(f"{a.draft} is an EAGLE-3 head: give --format eagle or speculators")
    if head and not is_head(a.draft) and Path(a.draft).is_dir():
        raise ValueError(f"{a.draft} is no EAGLE-3 head: --format hf exports a causal language model")
    if head and a.draft_sample_method != "greedy":
        raise ValueError("an EAGLE-3 head is exported without draft_sample_method: add it to the printed --speculative-config")
    shared = {"target": a.target, "num_speculative_tokens": a.num_speculative_tokens, "trust_remote_code": a.trust_remote_code}
    if head:
        return export_head(a.draft, a.output_path, format="eagle" if a.format == "eagle" else "speculators", **shared)
    return export_draft(a.draft, a.output_path, draft_sample_method=a.draft_sample_method, **shared)

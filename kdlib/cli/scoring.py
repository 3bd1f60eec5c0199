"""The options of lm-eval that kdlib distill and kdlib evaluate share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class ScoringArguments:
    """Scoring with lm-eval, by its own names.

    Args:
        tasks: lm-eval tasks, names or YAML files; kdlib distill scores final/, and at each evaluation.
        num_fewshot: examples in the prompt.
        limit: score only this many problems per task or below 1 this share of them.
        apply_chat_template: render prompts with the chat template.
        gen_kwargs: generation options, {max_gen_toks: 256} or max_gen_toks=256.
        include_path: directory with YAML tasks of your own.
    """

    tasks: list[str] | None = None
    num_fewshot: int | None = None
    limit: int | float | None = None
    apply_chat_template: bool = False
    gen_kwargs: dict[str, Any] | str | None = None
    include_path: str | None = None


def check_tasks(scoring: ScoringArguments) -> None:
    """ValueError when lm-eval is missing or does not know a task: better now than after the training."""
    if scoring.tasks:
        from kdlib.eval.harness import require_lm_eval
        from kdlib.eval.tasks import find_tasks

        require_lm_eval()
        find_tasks(scoring.tasks, include_path=scoring.include_path)

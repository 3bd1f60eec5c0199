"""What the commands that measure decoding on prompts share: prompts, models, results shown and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

if TYPE_CHECKING:
    from kdlib.eval.acceptance_prompts import PromptSet
    from kdlib.trainers import DistillationTrainer


class LoadingArguments(Protocol):
    """The options that say how a model is loaded."""

    dtype: str
    attn_implementation: str | None
    trust_remote_code: bool
    device: str | None


class ComparisonArguments(Protocol):
    """A model, and the one it was before training."""

    model: str
    base: str | None
    trust_remote_code: bool


def row_prompts(
    trainer: DistillationTrainer,
    prompt: Callable[[Mapping[str, Any]], list[int]],
    *,
    limit: int,
    max_new_tokens: int,
    context: float,
) -> list[list[int]]:
    """The prompts of the first ``limit`` evaluation rows, else training rows, that leave room for the new tokens."""
    rows = trainer.eval_rows or trainer.train_rows
    assert rows is not None
    prompts = [prompt(row) for row in rows.dataset.select(range(min(limit, len(rows.dataset))))]
    return [ids for ids in prompts if len(ids) + max_new_tokens <= context]


def print_unmeasured(console: Console, what: str, reason: str) -> None:
    """Why training ends without its measurement, and where its options are; what was trained is there all the same."""
    console.print(f"{what} not measured: {reason} (the options are --evaluate.NAME)", markup=False)


def loaded(a: LoadingArguments, name: str) -> Any:
    """The model of a path or Hub id, on the device that was asked for, else on the accelerator where there is one."""
    import torch

    from kdlib.models import load_model

    device = torch.device(a.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model: Any = load_model(
        name, dtype=a.dtype, attn_implementation=a.attn_implementation, trust_remote_code=a.trust_remote_code
    )
    return model.to(device)


def compared_tokenizer(a: ComparisonArguments) -> Any:
    """The model's; ValueError when the base has another one."""
    from kdlib.models import load_tokenizer
    from kdlib.tokenizers import explain_difference, same_tokenizer

    tokenizer = load_tokenizer(a.model, trust_remote_code=a.trust_remote_code)
    if a.base is not None:
        other = load_tokenizer(a.base, trust_remote_code=a.trust_remote_code)
        if not same_tokenizer(tokenizer, other):
            raise ValueError(
                f"model and base have different tokenizers ({explain_difference(tokenizer, other)}): tokens per forward of "
                "different tokens do not compare, give the model that was trained"
            )
    return tokenizer


def print_findings(console: Console, lines: Iterable[str]) -> None:
    """A line each; a check that failed stands out."""
    for line in lines:
        console.print(line, style="red" if "FAILED" in line else None, markup=False)


def print_left_out(console: Console, prompts: PromptSet) -> None:
    from kdlib.eval.report_parts import left_out

    if reasons := left_out(prompts):
        console.print(f"rows left out: {', '.join(reasons)}", markup=False)


def write_result(path: Path, content: Mapping[str, Any]) -> Path:
    """JSON without NaN; returns the path."""
    from kdlib.files import write_whole

    return write_whole(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

"""``kdlib evaluate``: lm-eval tasks, bits per byte on a text, and KL to a teacher."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from kdlib.cli.parsing import parse
from kdlib.cli.scoring import ScoringArguments, check_tasks

DESCRIPTION = """Scores a model: lm-eval tasks (--tasks), bits per byte of a text (--dataset_name), and
KL to a teacher (--teacher).

kdlib evaluate acceptance measures a draft for speculative decoding, kdlib evaluate jacobi the tokens per forward pass of a
model that decodes in parallel, kdlib evaluate diffusion accuracy against forward passes of a diffusion language model: see
their own --help."""


@dataclass
class EvaluateArguments:
    """What is scored, on what.

    Args:
        model: a path or Hub id.
        backend: hf runs the model in this process.
        teacher: report KL both ways and top-1 agreement with this model on dataset_name.
        dataset_name: rows for bits per byte, as for kdlib distill.
        dataset_test_split: split of these rows.
        max_length: rows longer than this keep their first max_length tokens.
        batch_size: rows at a time.
        output_path: write results as JSON to this file or directory.
        log_samples: keep every prompt and answer in that JSON.
        dtype: auto (as saved), float32 or bfloat16.
        device: cpu, cuda or cuda:N; chosen when left out.
    """

    model: str
    backend: Literal["hf"] = "hf"
    teacher: str | None = None
    dataset_name: str | None = None
    dataset_test_split: str = "train"
    max_length: int = 1024
    batch_size: int = 8
    output_path: str | None = None
    log_samples: bool = False
    dtype: str = "auto"
    device: str | None = None


def run(words: list[str]) -> int:
    if words[:1] == ["acceptance"]:
        from kdlib.cli.evaluate_acceptance import run as run_acceptance

        return run_acceptance(words[1:])
    if words[:1] == ["jacobi"]:
        from kdlib.cli.evaluate_jacobi import run as run_jacobi

        return run_jacobi(words[1:])
    if words[:1] == ["diffusion"]:
        from kdlib.cli.evaluate_diffusion import run as run_diffusion

        return run_diffusion(words[1:])
    options = parse("evaluate", DESCRIPTION, [EvaluateArguments, ScoringArguments], words)
    if options is None:
        return 0
    arguments, scoring = options.build(EvaluateArguments), options.build(ScoringArguments)
    if not scoring.tasks and not arguments.dataset_name:
        raise ValueError("nothing to score: add --tasks TASK, or --dataset_name FILE for bits per byte")
    if arguments.teacher and not arguments.dataset_name:
        raise ValueError("KL to a teacher is measured on rows: add --dataset_name FILE")
    check_tasks(scoring)
    results = _merged(
        _task_results(arguments, scoring) if scoring.tasks else {},
        _text_results(arguments) if arguments.dataset_name else {},
    )
    _show(results, arguments)
    return 0


def _show(results: dict[str, Any], arguments: EvaluateArguments) -> None:
    """A table on stdout and, where asked for, a JSON file of lm-eval's shape."""
    from kdlib.eval import results_table, write_results

    console = Console(soft_wrap=True, highlight=False)
    console.print(results_table({Path(arguments.model).name: results}))
    if arguments.dataset_name:
        counts = ", ".join(f"{results[name]:,} {name}" for name in ("rows", "truncated", "tokens", "bytes"))
        console.print(f"{arguments.dataset_name}: {counts}", markup=False)
    if arguments.output_path:
        console.print(f"written {write_results(results, arguments.output_path)}", markup=False)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two results of lm-eval's shape as one."""
    shared = ("results", "n-samples", "higher_is_better")
    return {**first, **second, **{key: {**first.get(key, {}), **second.get(key, {})} for key in shared}}


def _task_results(arguments: EvaluateArguments, scoring: ScoringArguments) -> dict[str, Any]:
    from kdlib.eval import evaluate

    return evaluate(
        arguments.model,
        batch_size=arguments.batch_size,
        log_samples=arguments.log_samples,
        dtype=arguments.dtype,
        device=arguments.device,
        **asdict(scoring),
    )


def _text_results(arguments: EvaluateArguments) -> dict[str, Any]:
    """Bits per byte (a bound for a diffusion model) and, with a teacher, KL, as a task named like the dataset; also flat, by
    their names.
    """
    import torch

    from kdlib.data import load_rows, prepare_dataset
    from kdlib.eval import bits_per_byte, diffusion_bound, kl_to_teacher
    from kdlib.eval.diffusion_config import is_diffusion
    from kdlib.models import load_model, load_tokenizer

    assert arguments.dataset_name is not None
    denoises = is_diffusion(arguments.model)
    if arguments.teacher and denoises:
        raise ValueError("KL to a teacher is that of the next token, which no diffusion model predicts: leave --teacher out")
    measure = diffusion_bound if denoises else bits_per_byte
    tokenizer = load_tokenizer(arguments.model)
    _check_teacher(arguments, tokenizer)
    rows = load_rows(arguments.dataset_name, split=arguments.dataset_test_split)
    prepared = prepare_dataset(rows, tokenizer, max_length=arguments.max_length)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(arguments.model, dtype=arguments.dtype)
    model.to(device)
    text = measure(model, prepared.dataset, tokenizer=tokenizer, batch_size=arguments.batch_size)
    task = Path(arguments.dataset_name).stem
    results, scores = text.as_results(task=task), asdict(text)
    if arguments.teacher:
        teacher = load_model(arguments.teacher, dtype=arguments.dtype)
        teacher.to(device)
        found = kl_to_teacher(model, teacher, prepared.dataset, tokenizer=tokenizer, batch_size=arguments.batch_size)
        results["results"][task] |= {f"{name},none": value for name, value in found.items() if name != "tokens"}
        scores |= found
    scores |= {
        "truncated": prepared.truncated,
        "dataset": arguments.dataset_name,
        "model_name": arguments.model,
    }
    return {**results, **scores}


def _check_teacher(arguments: EvaluateArguments, tokenizer: Any) -> None:
    """ValueError when student and teacher have different tokens: a KL between them would mean nothing."""
    from kdlib.models import load_tokenizer
    from kdlib.tokenizers import explain_difference, same_tokenizer

    if arguments.teacher:
        other = load_tokenizer(arguments.teacher)
        if not same_tokenizer(tokenizer, other):
            raise ValueError(
                f"model and teacher have different tokenizers ({explain_difference(tokenizer, other)}): "
                "compare their bits per byte instead, without --teacher"
            )

"""The end of a run: final/ is completed and scored as it lies on disk, samples and report are written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kdlib.cli.arguments import RunArguments
from kdlib.cli.card import write_card
from kdlib.cli.measured import measured_rows
from kdlib.cli.run_directory import RunDirectory
from kdlib.data import preview_rows
from kdlib.data.draft import first_scored
from kdlib.decoding.diffusion_decoder import decoder_of
from kdlib.decoding.sampling import context_length
from kdlib.diffusion.known import known_spec, spec_of
from kdlib.drafts.formats import is_head
from kdlib.eval import evaluate, write_report, write_results
from kdlib.eval.hacking_report import golden_line, golden_section
from kdlib.eval.page import Section
from kdlib.eval.report import read_metrics
from kdlib.eval.results import interval_text, summary_rows
from kdlib.models import load_model, load_tokenizer

SAMPLES, SAMPLE_TOKENS = 4, 128


def finish(
    directory: RunDirectory,
    trainer: Any,
    *,
    temporary: Path,
    loss: dict[str, float],
    arguments: RunArguments,
    scoring: dict[str, Any],
    sections: Sequence[Section] = (),
) -> None:
    """Scores and samples the saved student, writes its card, renames it to final/ and writes the report."""
    directory.write_json("eval/loss.json", {key: value for key, value in loss.items() if isinstance(value, int | float)})
    _write_samples(directory, trainer, temporary)
    scores = []
    if scoring["tasks"]:
        results = {**evaluate(str(temporary), **scoring), "model_name": str(directory.final)}
        write_results(results, directory.scores)
        scores = summary_rows(results)
    command = (directory.path / "command.txt").read_text(encoding="utf-8").splitlines()[-1]
    measured = measured_rows(directory)
    write_card(temporary, trainer=trainer, arguments=arguments, loss=loss, scores=scores, measured=measured, command=command)
    temporary.rename(directory.final)
    metrics = read_metrics(directory.path / "metrics.jsonl")
    write_report(directory.path, extra_sections=[*sections, golden_section(metrics)])


def summary_table(directory: RunDirectory) -> Table:
    """What the run reached: last training metrics, evaluation loss and task scores."""
    table = Table(title=str(directory.path), show_header=False, title_justify="left")
    for name, value in _headline(directory).items():
        table.add_row(name, value)
    return table


def _headline(directory: RunDirectory) -> dict[str, str]:
    lines = [json.loads(line) for line in (directory.path / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "grad_norm" in line]
    found = {
        key: f"{logged[-1][key]:.4g}"
        for key in ("loss", "kl_forward", "top1_agreement", "scored_tokens")
        if logged and key in logged[-1]
    }
    loss = directory.path / "eval" / "loss.json"
    if loss.is_file():
        found |= {
            key: f"{value:.4g}"
            for key, value in json.loads(loss.read_text()).items()
            if key in ("eval_loss", "eval_kl_forward", "eval_top1_agreement")
        }
    found |= {what: f"{value} (n={n})" for what, value, n in measured_rows(directory)}
    if any("golden/value" in line for line in lines):
        found["teacher hacking"] = golden_line(lines)
    if directory.scores.is_file():
        found |= {
            f"{row['task']} {row['metric']}": f"{interval_text(row)} (n={row['n']})"
            for row in summary_rows(json.loads(directory.scores.read_text()))
        }
    return found


def _write_samples(directory: RunDirectory, trainer: Any, student: Path) -> None:
    """rows.txt: rows with scored tokens marked; completions.jsonl: greedy answers of a student that is a language model."""
    train, tokenizer = trainer.train_rows.dataset, trainer.processing_class
    folder = directory.path / "samples"
    with (folder / "rows.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=160).print(preview_rows(train, tokenizer, count=SAMPLES))
    if is_head(student):  # which writes nothing without its target
        return
    asked = train if trainer.eval_rows is None else trainer.eval_rows.dataset
    rows = [asked[i] for i in range(min(SAMPLES, len(asked)))]
    model = load_model(str(student))
    model.to(trainer.accelerator.device)
    with (folder / "completions.jsonl").open("w", encoding="utf-8") as file:
        for answer in _completions(model.eval(), load_tokenizer(str(student)), rows):
            file.write(json.dumps(answer, ensure_ascii=False) + "\n")


def _completions(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The model's answers to what stands before each row's first scored token, where its context has room for one."""
    diffuses = known_spec(model.config) is not None
    new = decoder_of(model.config).gen_length if diffuses else SAMPLE_TOKENS
    prompts = [row["input_ids"][: first_scored(row["labels"])] for row in rows]
    prompts = [prompt for prompt in prompts if len(prompt) + new <= context_length(model)]
    answers = (_denoised if diffuses else _greedy)(model, prompts, tokenizer.pad_token_id) if prompts else []
    return [
        {"prompt": tokenizer.decode(prompt), "completion": tokenizer.decode(answer)}
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _denoised(model: Any, prompts: list[list[int]], pad: int) -> list[list[int]]:
    """A diffusion model's answers, by the decoding settings in its configuration."""
    decoder, answers = decoder_of(model.config), [list[int]() for _ in prompts]
    for rows, output in decoder.decode(model, prompts, spec=spec_of(model.config), batch_size=len(prompts)):
        responses = output.sequences[:, -decoder.gen_length :].tolist()
        for row, response, length in zip(rows, responses, output.lengths.tolist(), strict=True):
            answers[row] = response[:length]
    return answers


@torch.no_grad()
def _greedy(model: Any, prompts: list[list[int]], pad: int) -> list[list[int]]:
    """Greedy answers, in one batch."""
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]  # on the left, where generation wants it
    ids = [[pad] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * n + [1] * len(prompt) for n, prompt in zip(padding, prompts, strict=True)]
    made = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        pad_token_id=pad,
    )
    return [[token for token in answer if token != pad] for answer in made[:, longest:].tolist()]

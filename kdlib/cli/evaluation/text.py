"""Bits per byte of a text and, with a teacher, KL to it, of one model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from kdlib.cli.evaluation.asked import Asked
from kdlib.data import load_rows, prepare_dataset
from kdlib.eval import bits_per_byte, diffusion_bound, kl_to_teacher
from kdlib.eval.diffusion_config import is_diffusion
from kdlib.eval.sampled_rows import limited, rows_fingerprint
from kdlib.models import load_model, load_tokenizer
from kdlib.tokenizers import explain_difference, same_tokenizer


def text_scores(asked: Asked, name: str) -> dict[str, Any]:
    """Bits per byte (a bound for a diffusion model) and, with a teacher, KL, as a task named like the dataset; also flat, by
    their names.
    """
    g, kept = asked.general, asked.kept(name)
    assert g.dataset_name is not None
    rows = limited(load_rows(g.dataset_name, split=g.dataset_test_split), asked.scoring.limit)
    settings = asked.settings(name) | {"rows": rows_fingerprint(rows), "teacher": g.teacher, "max_length": g.max_length}
    found = kept.get("text", settings)
    return kept.put("text", settings, _measured(asked, name, rows)) if found is None else found


def check_text(asked: Asked, name: str) -> None:
    """ValueError when student and teacher have different tokens: a KL between them would mean nothing."""
    model, teacher = asked.models[name], asked.general.teacher
    if teacher and is_diffusion(model):
        raise ValueError("KL to a teacher is that of the next token, which no diffusion model predicts: leave --teacher out")
    tokenizer = load_tokenizer(model)
    if teacher:
        other = load_tokenizer(teacher)
        if not same_tokenizer(tokenizer, other):
            raise ValueError(
                f"model and teacher have different tokenizers ({explain_difference(tokenizer, other)}): "
                "compare their bits per byte instead, without --teacher"
            )


def _measured(asked: Asked, name: str, rows: Dataset) -> dict[str, Any]:
    g, path = asked.general, asked.models[name]
    assert g.dataset_name is not None
    measure = diffusion_bound if is_diffusion(path) else bits_per_byte
    tokenizer = load_tokenizer(path)
    prepared = prepare_dataset(rows, tokenizer, max_length=g.max_length)
    device = torch.device(g.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_model(path, dtype=g.dtype)
    model.to(device)
    text = measure(model, prepared.dataset, tokenizer=tokenizer, batch_size=g.batch_size)
    task = Path(g.dataset_name).stem
    results, scores = text.as_results(task=task), asdict(text)
    if g.teacher:
        teacher = load_model(g.teacher, dtype=g.dtype)
        teacher.to(device)
        found = kl_to_teacher(model, teacher, prepared.dataset, tokenizer=tokenizer, batch_size=g.batch_size)
        results["results"][task] |= {f"{metric},none": value for metric, value in found.items() if metric != "tokens"}
        scores |= found
    scores |= {"truncated": prepared.truncated, "dataset": g.dataset_name, "model_name": path}
    return {**results, **scores}

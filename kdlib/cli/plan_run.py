"""What a run will do and hold, before its first step; written to plan.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdlib.models import parameter_count
from kdlib.teachers import ConsistencyEnsemble, HFTeacher, leaves
from kdlib.trainers.setup import adapter_modules


def plan(trainer: Any) -> dict[str, Any]:
    """Parameters, bytes of weights, gradients and optimizer (AdamW: two moments) on a device, rows, steps."""
    args, rows = trainer.args, trainer.train_rows
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trained)
    tokens, scored = _tokens(rows.dataset)
    steps = args.max_steps if args.max_steps > 0 else trainer.steps_per_epoch() * args.num_train_epochs
    found = {
        "student_parameters": parameter_count(trainer.model),
        "trainable_parameters": count,
        "student_bytes": sum(p.numel() * p.element_size() for p in trainer.model.parameters()),
        "gradient_bytes": sum(p.numel() * p.element_size() for p in trained),
        "optimizer_bytes": 2 * sum(p.numel() * p.element_size() for p in trained),
        "rows": len(rows.dataset),
        "rows_skipped": rows.skipped,
        "rows_truncated": rows.truncated,
        "tokens_per_epoch": tokens,
        "scored_tokens_per_epoch": scored,
        "optimizer_steps": int(steps),
        "processes": trainer.accelerator.num_processes,
    }
    members = [
        one for leaf in leaves(trainer.teacher) for one in (leaf.teachers if isinstance(leaf, ConsistencyEnsemble) else (leaf,))
    ]
    models = [teacher.model for teacher in members if isinstance(teacher, HFTeacher)]
    if models:
        parameters = [p for model in models for p in model.parameters()]
        found["teacher_parameters"] = sum(p.numel() for p in parameters)
        found["teacher_bytes"] = sum(p.numel() * p.element_size() for p in parameters)
    if adapted := adapter_modules(trainer.model):
        found["adapter_modules"] = adapted
    if args.on_policy_fraction:
        rows = args.train_batch_size * args.gradient_accumulation_steps * found["processes"]
        found["completions_per_step"] = round(rows * args.on_policy_fraction)
        found["max_completion_length"] = args.max_completion_length
    return found


def _tokens(dataset: Any) -> tuple[int, int]:
    """(tokens, scored tokens) of an epoch; a row's first token is never scored."""
    tokens = scored = 0
    for batch in dataset.with_format("arrow").iter(batch_size=4096):
        labels = batch["labels"].combine_chunks().flatten().to_numpy()
        tokens, scored = tokens + len(labels), scored + int(np.sum(labels != -100))
    return tokens, scored

"""What a run will do, before its first step: parameters, rows, tokens, steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import nn

from kdlib.cli.planning.live import tensor_bytes
from kdlib.cli.planning.optimizer import optimizer_name, state_bytes
from kdlib.models import parameter_count
from kdlib.teachers import ConsistencyEnsemble, HFTeacher, leaves
from kdlib.trainers.setup import adapter_modules


def plan(trainer: Any, *, processes: int | None = None, rows: int | None = None) -> dict[str, Any]:
    """Parameters, bytes of weights, gradients and optimizer, rows, tokens and optimizer steps.

    processes: how many will run, as many as do when left out. rows: how many the trainer's rows stand for, their own number
    when left out.
    """
    args, prepared = trainer.args, trainer.train_rows
    processes = processes or trainer.accelerator.num_processes
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    here = len(prepared.dataset)
    count = here if rows is None else rows
    tokens, scored = (total * count // here for total in _tokens(prepared.dataset))
    per_epoch = _steps(trainer, processes=processes, rows=rows)
    steps = args.max_steps if args.max_steps > 0 else per_epoch * args.num_train_epochs
    found = {
        "student_parameters": parameter_count(trainer.model),
        "trainable_parameters": parameter_count(trainer.model, trainable=True),
        "student_bytes": tensor_bytes(trainer.model.parameters()),
        "gradient_bytes": tensor_bytes(trained),
        "optimizer_bytes": state_bytes(trained, optimizer_name(args)),
        "rows": count,
        "rows_skipped": prepared.skipped,
        "rows_truncated": prepared.truncated,
        "tokens_per_epoch": tokens,
        "scored_tokens_per_epoch": scored,
        "steps_per_epoch": per_epoch,
        "optimizer_steps": math.ceil(steps),
        "processes": processes,
    }
    parameters = [p for model in _teachers(trainer) for p in model.parameters()]
    if parameters:
        found["teacher_parameters"] = sum(p.numel() for p in parameters)
        found["teacher_bytes"] = sum(p.numel() * p.element_size() for p in parameters)
    if adapted := adapter_modules(trainer.model):
        found["adapter_modules"] = adapted
    if args.on_policy_fraction:
        drawn = args.train_batch_size * args.gradient_accumulation_steps * processes
        found["completions_per_step"] = round(drawn * args.on_policy_fraction)
        found["max_completion_length"] = args.max_completion_length
    return found


def _steps(trainer: Any, *, processes: int, rows: int | None) -> int:
    """Optimizer steps of an epoch, of the trainer's own rows or of as many as they stand for."""
    args = trainer.args
    if rows is None and processes == trainer.accelerator.num_processes:
        return int(trainer.steps_per_epoch())
    drawn = (len(trainer.train_rows.dataset) if rows is None else rows) * args.num_generations
    return max(1, math.ceil(drawn / (args.train_batch_size * processes * args.gradient_accumulation_steps)))


def _teachers(trainer: Any) -> list[nn.Module]:
    """The models of teachers in this process."""
    members = [
        one for leaf in leaves(trainer.teacher) for one in (leaf.teachers if isinstance(leaf, ConsistencyEnsemble) else (leaf,))
    ]
    return [teacher.model for teacher in members if isinstance(teacher, HFTeacher)]


def _tokens(dataset: Any) -> tuple[int, int]:
    """(tokens, scored tokens) of an epoch; a row's first token is never scored."""
    tokens = scored = 0
    for batch in dataset.with_format("arrow").iter(batch_size=4096):
        labels = batch["labels"].combine_chunks().flatten().to_numpy()
        tokens, scored = tokens + len(labels), scored + int(np.sum(labels != -100))
    return tokens, scored

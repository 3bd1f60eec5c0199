"""Which option makes a run smaller, and by how much."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel
from torch import nn

from kdlib.cli.planning.live import tensor_bytes
from kdlib.cli.planning.memory import Layout
from kdlib.cli.planning.optimizer import optimizer_name, state_bytes
from kdlib.cli.planning.step import GRADIENTS, TEACHER
from kdlib.teachers import HFTeacher

Phases = dict[str, dict[str, int]]
PROCESSES = 8  # of the knob that names FSDP2
LORA_RANK = 16  # kdlib's default


def memory_knobs(
    trainer: Any, layout: Layout, rows: list[dict[str, Any]], found: Phases, planned: Callable[..., Phases]
) -> dict[str, int]:
    """{option: bytes that it saves}, those that save something; ``planned`` plans other rows of a micro-batch."""
    args, needed = trainer.args, _needed(found)
    checkpointing = bool(args.gradient_checkpointing)
    saved: dict[str, int] = {}
    if not checkpointing:
        saved["gradient_checkpointing true"] = needed - _needed(planned(rows, checkpointing=True))
    if args.per_device_train_batch_size > 1:
        rest = args.per_device_train_batch_size * args.gradient_accumulation_steps
        knob = f"per_device_train_batch_size 1 with gradient_accumulation_steps {rest}"
        saved[knob] = needed - _needed(planned(rows[:1], checkpointing=checkpointing))
    if all(row.keys() <= {"input_ids", "labels", "sample_id"} for row in rows):
        half = max(len(row["input_ids"]) for row in rows) // 2
        shorter = [{**row, "input_ids": row["input_ids"][:half], "labels": [-100, *row["input_ids"][1:half]]} for row in rows]
        if half > 1:
            saved[f"max_length {half}"] = needed - _needed(planned(shorter, checkpointing=checkpointing))
    saved |= {knob: needed - _needed(changed) for knob, changed in _without(trainer, layout, found).items()}
    return {knob: count for knob, count in saved.items() if count > 0}


def _needed(found: Phases) -> int:
    return max(sum(parts.values()) for parts in found.values())


def _without(trainer: Any, layout: Layout, found: Phases) -> dict[str, Phases]:
    """{option: phases}, by taking away what it makes unnecessary."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    changed: dict[str, Phases] = {}
    if not isinstance(model, PeftModel):
        changed["use_peft true"] = _adapted(model, found, optim=optimizer_name(trainer.args))
    if isinstance(trainer.teacher, HFTeacher) and not trainer.args.on_policy_fraction:
        changed["a teacher of kdlib cache"] = {
            phase: {part: count for part, count in parts.items() if part not in ("teacher", TEACHER)}
            for phase, parts in found.items()
        }
    if layout.device == "cuda" and not layout.sharded and not trainer.args.on_policy_fraction:
        cut = ("student", "optimizer", GRADIENTS)
        changed[f"accelerate_config fsdp2 with num_processes {PROCESSES}"] = {
            phase: {part: count // PROCESSES if part in cut else count for part, count in parts.items()}
            for phase, parts in found.items()
        }
    return changed


def _adapted(model: nn.Module, found: Phases, *, optim: str) -> Phases:
    """With gradients and optimizer of an adapter in the place of those of all weights."""
    linear = [x for x in model.modules() if isinstance(x, nn.Linear) and x is not model.get_output_embeddings()]  # type: ignore[operator]
    adapter = sum(4 * LORA_RANK * (x.in_features + x.out_features) for x in linear)
    trained = list(model.parameters())
    moments = adapter * state_bytes(trained, optim) // max(1, tensor_bytes(trained))
    small = {"optimizer": moments, GRADIENTS: adapter}
    return {
        phase: {part: min(count, small.get(part, count)) for part, count in parts.items()} for phase, parts in found.items()
    }


def disk_knobs(trainer: Any, parts: dict[str, int]) -> dict[str, int]:
    """{option: bytes that it saves on disk}."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    one, several = parts["a checkpoint"], parts["checkpoints at once"]
    trained = [x for x in model.parameters() if x.requires_grad]
    optimizer = state_bytes(trained, optimizer_name(trainer.args))
    count = several // one if one else 0
    saved = {"save_total_limit 1": max(0, count - 2) * one, "save_strategy no": several}
    if not trainer.args.save_only_model:
        saved["save_only_model true (such a run cannot resume)"] = count * optimizer
    return {knob: count for knob, count in saved.items() if count > 0}

"""What a training run will take: parameters, memory of a device, disk, steps and tokens, before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kdlib.cli.planning.disk import cache_bytes, disk, free_disk, total
from kdlib.cli.planning.knobs import disk_knobs, memory_knobs
from kdlib.cli.planning.memory import Layout, engine_bytes, free_memory, phases, whole_memory
from kdlib.cli.planning.rollouts import drawn_at_once, traced_rollouts
from kdlib.cli.planning.rows import longest_rows
from kdlib.cli.planning.run import plan
from kdlib.cli.planning.step import traced_step
from kdlib.cli.planning.text import refusals
from kdlib.teachers import CachedTeacher, SelfTeacher, leaves
from kdlib.trainers import DiffusionTrainer, JacobiTrainer

Plan = dict[str, Any]


def layout_of(trainer: Any) -> Layout:
    """How a run that is about to start is spread."""
    accelerator = trainer.accelerator
    sharded = bool(trainer.is_fsdp_enabled)
    return Layout(device=accelerator.device.type, processes=accelerator.num_processes, sharded=sharded)


def estimate(
    trainer: Any,
    *,
    layout: Layout | None = None,
    memory: int | None = None,
    room: int | None = None,
    engine: str | None = None,
    bits: int | None = None,
    rows: int | None = None,
    assumed: Sequence[str] = (),
) -> Plan:
    """What ``kdlib plan`` prints, and plan.json holds, of a trainer whose models may lie on meta; JSON as it is.

    layout: how the run is spread, as the trainer is when left out. memory, room: bytes of a device and of the disk; those that
    are free when left out. engine: what draws rollouts. bits: of a quantised student. rows: their number, where those of the
    trainer stand for more. assumed: what is not known, in words.
    """
    layout = layout or layout_of(trainer)
    found: Plan = {**plan(trainer, processes=layout.processes, rows=rows), "assumed": list(assumed)}
    found |= {"memory": None, "not_planned": ""}
    free = free_memory(layout.device) if memory is None else memory
    try:
        found["memory"] = _memory(trainer, layout, free=free, engine=engine or trainer.args.rollout.engine, bits=bits)
    except Exception as error:  # whatever a model or objective does that tensors without memory cannot: no reason not to train
        found["not_planned"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    found["disk"] = _disk(trainer, found, free=free_disk(trainer.args.output_dir) if room is None else room)
    return found


def fitting(trainer: Any) -> Plan:
    """The plan of a run that is about to start; ValueError where it needs more than the whole GPU has."""
    found = estimate(trainer)
    memory = found["memory"]
    if memory is not None and memory["device"] == "cuda" and memory["needed"] > whole_memory():
        raise ValueError(refusals(found)[0])
    return found


def _memory(trainer: Any, layout: Layout, *, free: int, engine: str, bits: int | None) -> Plan:
    args = trainer.args
    rows = longest_rows(trainer, args.train_batch_size)
    accumulates = args.gradient_accumulation_steps > 1
    drawn: dict[str, int] = {}
    if trainer.on_policy is not None and engine == "hf":
        drawn = traced_rollouts(trainer, longest_rows(trainer, drawn_at_once(trainer)))
    if trainer.on_policy is not None and engine == "vllm":
        drawn = {"vLLM engine": engine_bytes(trainer, layout, total=free)}

    def planned(batch: list[dict[str, Any]], *, checkpointing: bool) -> dict[str, dict[str, int]]:
        traced = traced_step(trainer, batch, checkpointing=checkpointing, accumulates=accumulates)
        return phases(trainer, layout, traced=traced, rollouts=drawn, bits=bits, keeps_engine=engine == "vllm")

    found = planned(rows, checkpointing=args.gradient_checkpointing)
    phase = max(found, key=lambda name: sum(found[name].values()))
    needed = sum(found[phase].values())
    longest = max(len(row["input_ids"]) for row in rows)
    made: Plan = {"device": layout.device, "needed": needed, "phase": phase, "free": free, "longest_row": longest}
    helps = memory_knobs(trainer, layout, rows, found, planned) if needed > free else {}
    return {**made, "phases": found, "helps": helps}


def _disk(trainer: Any, found: Plan, *, free: int) -> Plan:
    parts = disk(trainer, steps=found["optimizer_steps"])
    instead = {}
    if found["scored_tokens_per_epoch"] and _could_be_cached(trainer):
        each = cache_bytes(trainer.vocab_size)
        instead[f"the teacher as a cache (kdlib cache, {each} bytes a token)"] = each * found["scored_tokens_per_epoch"]
    needed = total(parts)
    helps = disk_knobs(trainer, parts) if needed > free else {}
    return {"parts": parts, "instead": instead, "needed": needed, "free": free, "helps": helps}


def _could_be_cached(trainer: Any) -> bool:
    """Whether the teacher reads nothing but rows that are there beforehand, and is not a cache already."""
    if trainer.teacher is None or trainer.args.on_policy_fraction or isinstance(trainer, JacobiTrainer | DiffusionTrainer):
        return False
    return not any(isinstance(member, CachedTeacher | SelfTeacher) for member in leaves(trainer.teacher))

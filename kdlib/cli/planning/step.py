"""One training step of a trainer, run without memory: what it holds beside weights and optimizer when it holds most."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from kdlib.cli.planning.live import LiveBytes, twin, without_memory
from kdlib.cli.planning.models import stand_in
from kdlib.cli.planning.scored import buffers, first_rows, left_out
from kdlib.kernels.chunked import CPU_BLOCK_BYTES, CPU_CHUNK
from kdlib.models import inner
from kdlib.teachers import CachedTeacher, ConsistencyEnsemble, VLLMTeacher, leaves
from kdlib.trainers import CrossTokenizerTrainer, DiffusionTrainer, JacobiTrainer
from kdlib.types import Positions, TeacherSignal

Row = dict[str, Any]
# Rows of the loss that are run: on a GPU the largest chunk of the kernel; on a CPU, where it goes through a chunk in many small
# blocks, a few. Those beyond add what their hidden states and their part of a chunk take.
GPU_ROWS, CPU_ROWS = 4096, 32
GRADIENTS, ACTIVATIONS, LOSS, TEACHER, BACKWARD = "gradients", "activations", "loss", "teacher's pass", "backward pass"


def traced_step(trainer: Any, rows: list[Row], *, checkpointing: bool, accumulates: bool) -> dict[str, int]:
    """Bytes by what they are for, at the moment of forward and backward pass when most are held.

    ``rows``: those of a micro-batch. ``checkpointing``: gradient checkpointing. ``accumulates``: gradients of earlier
    micro-batches are there. The trainer's own code runs, on tensors that have shapes and no memory; nothing of it changes.
    """
    trainer = _still(trainer)
    batch = _prepared(trainer, rows)
    signals = trainer.signals(batch) if _answers_now(trainer) else None
    mode, live = FakeTensorMode(allow_non_fake_inputs=True), LiveBytes()
    names = {"teacher": batch["teacher"]} if "teacher" in batch else {}
    batch, signals = without_memory(batch, mode) | names, without_memory(signals, mode)
    with _twins(trainer, mode, live) as student:
        _ready(student, live, kwargs=trainer.args.gradient_checkpointing_kwargs if checkpointing else None)
        live.known(_tensors([batch, signals]))
        with mode, live:
            if accumulates:
                _give_gradients(student, live)
            _forward_and_backward(trainer, student, batch, signals, live)
    return {name: size for name, size in live.at_most.items() if size}


def _prepared(trainer: Any, rows: list[Row]) -> dict[str, Any]:
    """The rows as a batch with its positions; a mask of ones is left out, as attention then is."""
    collate = trainer.data_collator if trainer.on_policy is None else trainer.on_policy.collator
    batch = send_to_device(collate(rows), trainer.accelerator.device)
    # rows are chosen by running models, which no one waits for here
    made = batch if trainer.selects_rows else trainer.prepare([batch])[0]
    made = made if "positions" in made else {**made, "positions": trainer.positions(made)}
    masks = {key for key, x in made.items() if key.endswith("attention_mask") and bool(x.all())}
    return {key: value for key, value in made.items() if key not in masks}


def _still(trainer: Any) -> Any:
    """The trainer as it is when training begins, but running no model while it prepares a step: states of noise are as large as
    those of the student.
    """
    other = copy.copy(trainer)
    other.objective_state = trainer.objective.init_state(max(1, trainer.args.max_steps))
    if isinstance(trainer, JacobiTrainer) and trainer.state_source == "student":
        other.state_source = "noise"
    if isinstance(trainer, CrossTokenizerTrainer):  # which keeps what it measures for the end of the step
        other.balance = copy.deepcopy(trainer.balance)
    if isinstance(trainer, DiffusionTrainer):  # tokens that a teacher draws are as many as those that are known
        other._drawn = lambda batch, read, drawn, *, known, step, stream: known
    return other


def _answers_now(trainer: Any) -> bool:
    """Whether the teacher's answers are read from disk, which happens outside of all this."""
    return any(isinstance(member, CachedTeacher) for member in leaves(trainer.teacher))


@contextmanager
def _twins(trainer: Any, mode: FakeTensorMode, live: LiveBytes) -> Iterator[nn.Module]:
    """The student's twin; teachers have twins in the place of their models meanwhile."""
    model, device = trainer.accelerator.unwrap_model(trainer.model), trainer.accelerator.device
    made = {id(model): twin(model, mode, device=device)}
    holders: list[Any] = [
        one
        for leaf in leaves(trainer.teacher)
        for one in (leaf.teachers if isinstance(leaf, ConsistencyEnsemble) else (leaf,))
        if isinstance(getattr(one, "model", None), nn.Module)  # servers and caches have none
    ]
    kept = [(holder, holder.model) for holder in holders]
    for holder, own in kept:
        if id(own) not in made:
            made[id(own)] = twin(own, mode, device=device)
        holder.model = made[id(own)]
    for one in made.values():
        live.known([*one.parameters(), *one.buffers()])
    try:
        yield made[id(model)]
    finally:
        for holder, own in kept:
            holder.model = own


def _ready(student: nn.Module, live: LiveBytes, *, kwargs: dict[str, Any] | None) -> None:
    """Training mode, checkpointing with ``kwargs``, and hooks that say what is made when."""
    student.train()
    if kwargs is not None:
        # random states are on no tensor that has memory
        inner(student).gradient_checkpointing_enable({**kwargs, "preserve_rng_state": False})
    decoder = inner(student).get_decoder()

    def label(before: str, after: str) -> Any:
        def hook(*_: Any) -> None:
            live.label = after if live.label == before else live.label

        return hook

    decoder.register_forward_pre_hook(label(LOSS, ACTIVATIONS))
    decoder.register_forward_hook(label(ACTIVATIONS, LOSS))

    def gradient(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.relabel(parameter.grad, GRADIENTS)

    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(gradient)


def _give_gradients(student: nn.Module, live: LiveBytes) -> None:
    """Gradients of an earlier micro-batch."""
    with live.labelled(GRADIENTS):
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)


def _forward_and_backward(trainer: Any, student: nn.Module, batch: dict[str, Any], signals: Any, live: LiveBytes) -> None:
    if signals is None and not trainer.teacher_signals.inside_forward:
        with live.labelled(TEACHER):
            signals = _asked(trainer, batch)
    with live.labelled(ACTIVATIONS):
        total = _loss(trainer, student, batch, trainer.signals(batch) if signals is None else signals, live=live)
    del signals
    with live.labelled(BACKWARD):
        total.backward()


def _asked(trainer: Any, batch: dict[str, Any]) -> Any:
    """The teacher's answers; a server is not asked, its answers have the shapes that the options say."""
    if not isinstance(trainer.teacher, VLLMTeacher):
        return trainer.signals(batch)
    server = stand_in(trainer)
    return {name: server.signal(batch, positions) for name, positions in batch["positions"].items()}


def _loss(trainer: Any, student: nn.Module, batch: dict[str, Any], signals: Any, *, live: LiveBytes) -> Tensor:
    """The step's loss as the trainer makes it; of the scored rows the first ones are run."""
    width, limit = inner(student).config.get_text_config().hidden_size, _rows_run(trainer)
    where, answers, rest = {}, {}, 0
    for name, positions in batch["positions"].items():
        signal = signals.get(name)
        where[name], answers[name] = first_rows(positions, signal, limit=limit)
        left = len(positions) - len(where[name])
        rest += left_out(left, width=width, signal=signal, args=trainer.args)
        rest += buffers(min(left, max(0, CPU_CHUNK - limit)), trainer.vocab_size, signal)
    with live.labelled(LOSS):
        beside = torch.empty(rest, dtype=torch.uint8)  # what the rows that are not run would hold
    losses = trainer.terms(student, {**batch, "positions": where}, answers)
    shares = [trainer.term_weight(name) * loss.sum / max(1, loss.count) for name, loss in losses.items()]
    del beside
    return torch.stack(shares).sum()


def _rows_run(trainer: Any) -> int:
    """How many scored rows are run: a chunk on a GPU; on a CPU at least one of the kernel's blocks."""
    if trainer.accelerator.device.type == "cuda":
        return GPU_ROWS
    return max(CPU_ROWS, min(CPU_CHUNK, CPU_BLOCK_BYTES // (4 * trainer.vocab_size)))


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of batches, positions and signals."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Positions | TeacherSignal):
        return [x for f in fields(value) for x in _tensors(getattr(value, f.name))]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [x for part in parts for x in _tensors(part)]

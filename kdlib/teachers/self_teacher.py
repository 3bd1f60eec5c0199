"""The student as its own teacher: as it is, averaged over its past, or without its adapter."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kdlib.data.positions import teacher_inputs
from kdlib.files import write_whole
from kdlib.head import Head
from kdlib.models import evaluating, hidden_states
from kdlib.types import Positions, Support, TeacherSignal

EMA_FILE = "teacher_ema.safetensors"


class SelfTeacher:
    """The student's own distribution, without gradients and without dropout.

    kind: ``student`` (as it is in this step), ``ema`` (an exponential moving average of its trained weights in float32),
    ``copy`` (as it was at the start, or at the last ``refresh``, in float32) or ``adapter_off`` (the model below the student's
    adapter). decay: of the average, ema = decay ema + (1 - decay) student after each optimizer step. Rows with a
    ``teacher_prompt`` show the teacher more than the student sees: without that, ``student`` has nothing to teach.
    vocab_size: cut the head to this many entries (the tokenizer's length), set by the trainer.
    """

    provides = Support.FULL

    def __init__(
        self,
        kind: Literal["student", "ema", "copy", "adapter_off"] = "student",
        *,
        decay: float = 0.99,
        vocab_size: int | None = None,
    ) -> None:
        if kind not in ("student", "ema", "copy", "adapter_off"):
            raise ValueError(f"SelfTeacher.kind is student, ema, copy or adapter_off, not {kind!r}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"SelfTeacher.decay must be at least 0 and below 1, not {decay}")
        self.kind, self.decay, self.vocab_size = kind, decay, vocab_size
        self.student: nn.Module | None = None
        self.model: nn.Module | None = None
        self.dtype: torch.dtype | None = None

    @property
    def inside_forward(self) -> bool:
        """Whether ``signal`` runs the student's own weights, which wrappers gather inside their forward only."""
        return not self.keeps_weights

    @property
    def keeps_weights(self) -> bool:
        """Whether it has weights of its own beside the student's."""
        return self.kind in ("ema", "copy")

    def bind_student(self, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Takes the unwrapped student, on its device; ``dtype``: the autocast type of its head, None for full precision."""
        if self.kind == "adapter_off" and not isinstance(model, PeftModel):
            raise ValueError(
                "SelfTeacher(kind='adapter_off') needs a student with an adapter: give peft_config (use_peft true)"
            )
        self.student, self.dtype = model, dtype
        self.model = _averaged_copy(model) if self.keeps_weights else model

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        """TeacherSignal(hidden [N, D], head) of the rows, from ``teacher_inputs``."""
        assert self.model is not None, "bind_student comes first"
        inputs, index = teacher_inputs(batch, positions)
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))
            if self.kind == "adapter_off":
                stack.enter_context(_without_adapter(self.model))
            hidden, features = hidden_states(self.model, inputs, layers=layers)
            head = Head.of(self.model, vocab_size=self.vocab_size, dtype=self.dtype).detached()
        return TeacherSignal(hidden=hidden.flatten(0, 1).index_select(0, index), head=head, features=features)

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the average towards the student; nothing to do for the other kinds."""
        if self.kind == "ema":
            self._move(1.0 - self.decay)

    @torch.no_grad()
    def refresh(self) -> None:
        """Kinds with weights of their own become the student as it is."""
        if self.keeps_weights:
            self._move(1.0)

    def _move(self, share: float) -> None:
        assert self.student is not None
        now = dict(self.student.named_parameters())
        for name, average in self._averages().items():
            if isinstance(now[name], DTensor):
                raise ValueError(f"SelfTeacher(kind={self.kind!r}) needs the student's whole weights on each process: use DDP")
            average.lerp_(now[name].to(average.dtype), share)

    def save(self, directory: Path) -> None:
        """Writes weights of its own into a checkpoint; nothing for the other kinds."""
        if self.keeps_weights:
            write_whole(directory / EMA_FILE, save({name: x.contiguous() for name, x in self._averages().items()}))

    @torch.no_grad()
    def load(self, directory: Path) -> None:
        """Reads what ``save`` wrote; ValueError when the checkpoint has no such weights or those of another student."""
        if not self.keeps_weights:
            return
        if not (directory / EMA_FILE).is_file():
            kind = f"SelfTeacher(kind={self.kind!r})"
            raise ValueError(f"{directory} holds no {EMA_FILE}: it was not written with {kind}, start anew")
        saved, averages = load_file(directory / EMA_FILE), self._averages()
        if {n: x.shape for n, x in saved.items()} != {n: x.shape for n, x in averages.items()}:
            raise ValueError(f"{directory / EMA_FILE} keeps other weights than this student trains: start anew")
        for name, average in averages.items():
            average.copy_(saved[name])

    def _averages(self) -> dict[str, Tensor]:
        """The teacher's own parameters by the student's names: all, or those that an adapter trains."""
        assert self.student is not None and self.model is not None
        shared = {id(parameter) for parameter in self.student.parameters()}
        return {name: x for name, x in self.model.named_parameters() if id(x) not in shared}


def _averaged_copy(model: nn.Module) -> nn.Module:
    """A frozen copy with averaged parameters in float32; what an adapter leaves frozen is not copied but shared."""
    shared = {id(x): x for x in model.parameters() if not x.requires_grad} if isinstance(model, PeftModel) else {}
    made: nn.Module = copy.deepcopy(model, dict(shared))
    for parameter in made.parameters():
        if id(parameter) not in shared:
            parameter.data = parameter.data.float()
    return made.eval().requires_grad_(False)


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """peft's switch makes every adapter weight trainable when it is turned back: which were is restored here."""
    assert isinstance(model, PeftModel)
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, was in trainable:
            parameter.requires_grad_(was)

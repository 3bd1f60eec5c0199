"""Training a language model to reach the fixed point of a block in fewer Jacobi iterations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from kdlib.data import load_rows
from kdlib.data.jacobi import JacobiCollator, packed
from kdlib.data.jacobi.layout import AR, CONSISTENCY
from kdlib.head import Head
from kdlib.kernels import linear_objective
from kdlib.models import check_streams, evaluating, hidden_states
from kdlib.objectives import CrossEntropy, ForwardKL
from kdlib.teachers import SelfTeacher, resolve_teacher
from kdlib.trainers import jacobi_states, setup
from kdlib.trainers.distillation import Batch, DistillationTrainer
from kdlib.trainers.jacobi_checks import check_objective, check_stored, check_teacher, state_source
from kdlib.trainers.jacobi_config import JacobiConfig
from kdlib.trainers.jacobi_terms import teacher_reads_text
from kdlib.trainers.scoring import of_terms
from kdlib.types import Loss, StudentSignal, TeacherSignal


class JacobiTrainer(DistillationTrainer):
    """Consistency training: loss = consistency_weight mean_i D(p(.|y_<=i) || q(.|s_<=i)) + ar_weight mean_t -log q(y_t|y_<t).

    s is a state of a block on the way to its fixed point y, i runs from its first mismatch with y on; p is the teacher on the
    text itself (``consistency`` global, CLLM) or on the block's next state (local). All blocks, states and the text are streams
    of one forward pass (``kdlib.streams``); both means are over the whole step, whatever the number of blocks.

    teacher: None or SelfTeacher() for the student itself, gradient stopped, from the same pass; SelfTeacher(kind="ema") or
    "adapter_off"; a path or model, frozen. objective: D, a row objective, ForwardKL by default.
    train_dataset: rows of ``kdlib trajectories jacobi``, or any rows with ``state_source`` student or noise.
    on_policy_fraction 1 with rollout temperature 0 and state_source student renews text and states with the student.

    Sources: CLLM (Kou et al. 2024), whose published code has the global loss alone; Jacobi Forcing (Hu et al. 2025), whose code
    divides the consistency mean once more by the number of blocks, which its formula does not.
    Raises ValueError for teachers without whole distributions on given text, and rows that do not have what options ask for.
    """

    args: JacobiConfig

    def __init__(
        self,
        model: str | nn.Module,
        teacher: Any = None,
        *,
        objective: Any = None,
        args: JacobiConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **options: Any,
    ) -> None:
        args = args or JacobiConfig(output_dir=setup.default_output_dir(model))
        objective = objective or ForwardKL()
        check_objective(objective)
        teacher = resolve_teacher(teacher, args.teacher_options) or SelfTeacher()
        check_teacher(teacher, args)
        tokenizer = processing_class or setup.student_tokenizer(model, args)
        if isinstance(train_dataset, str):
            train_dataset = load_rows(train_dataset, tokenizer=tokenizer)
        rows = setup.prepared(train_dataset, tokenizer, args, packing=False, training=True)
        self.state_source = state_source(args, rows)
        eval_rows = setup.prepared(eval_dataset, tokenizer, args, packing=False)
        if self.state_source == "stored" and eval_rows is not None:
            check_stored(args, eval_rows, what="evaluation rows")
        super().__init__(
            model,
            teacher,
            objective=objective,
            args=args,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            data_collator=JacobiCollator(tokenizer.pad_token_id, stored=self.state_source == "stored"),
            **options,
        )
        if self.accelerator.distributed_type == "FSDP" and self.state_source == "student":
            raise ValueError(
                "state_source student iterates the student before the forward pass, where FSDP has it in parts: use ddp"
            )

    def check_student(self, student: nn.Module) -> None:
        """ValueError also for a student that cannot read several streams in one pass."""
        check_streams(student, role="student")
        super().check_student(student)

    @property
    def _own_teacher(self) -> bool:
        """Whether the teacher's distributions come from the student's own forward pass."""
        return isinstance(self.teacher, SelfTeacher) and self.teacher.kind == "student"

    def term_weight(self, term: str) -> float:
        return self.args.ar_weight if term == AR else self.args.consistency_weight

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """The text of each batch with the states of this step beside it."""
        step = self.state.global_step + 1
        return [self._packed(batch, step=step) for batch in super().prepare(batches)]

    def evaluation_batch(self, batch: Batch) -> Batch:
        """As in training, with the draws of step 0."""
        return self._packed(batch, step=0)

    def _packed(self, batch: Batch, *, step: int) -> Batch:
        where = jacobi_states.spans(batch)
        rows = self._states(batch, where, step=step)
        made = packed(
            batch,
            jacobi_states.chosen(batch, where, rows, self.args, step=step),
            layout=self.args.layout,
            references=jacobi_states.references(batch, where, rows, self.args),
            pad_token_id=self.processing_class.pad_token_id,
        )
        made |= {"sample_id": batch["sample_id"]}
        if not self._own_teacher and self.args.consistency == "global":
            made = teacher_reads_text(made, batch)
        positions = {name: where.to(self.accelerator.device) for name, where in made.pop("positions").items()}
        return {**send_to_device(made, self.accelerator.device), "positions": positions}

    @torch.no_grad()
    def _states(self, batch: Batch, where: jacobi_states.Spans, *, step: int) -> list[Any]:
        if self.state_source == "stored":
            return list(batch["trajectory"])
        if self.state_source == "noise":
            return jacobi_states.noise(batch, where, self.args, step=step)
        model = self.accelerator.unwrap_model(self.model)
        with evaluating(model), self.accelerator.autocast():
            return jacobi_states.student_states(model, batch, where, self.args, step=step)

    def signals(self, batch: Batch) -> dict[str, TeacherSignal | None]:
        """The rows of a teacher of its own for the terms that read it; those of the student itself are made in ``terms``."""
        names = [CONSISTENCY] * (self.objective.accepts is not None) + [AR] * (self.args.ar_labels == "teacher")
        found: dict[str, TeacherSignal | None] = {CONSISTENCY: None, AR: None}
        if self._own_teacher or not names:
            return found
        assert self.teacher is not None
        assert self.teacher is not None
        with self._watch.part("teacher"), self.accelerator.autocast():
            return found | of_terms(self.teacher, batch, {name: batch["positions"][name] for name in names})

    def terms(self, model: nn.Module, batch: Batch, signals: Mapping[str, TeacherSignal | None]) -> dict[str, Loss]:
        """Consistency of the states and the auto-regressive term on the text, from one forward pass."""
        with self.accelerator.autocast():
            hidden = hidden_states(model, batch)[0].flatten(0, 1)
        head = Head.of(model, vocab_size=self.vocab_size, dtype=self.args.compute_dtype)
        student = {
            name: StudentSignal(hidden=hidden.index_select(0, where.index), head=head, positions=where)
            for name, where in batch["positions"].items()
        }
        signal = signals[CONSISTENCY]
        if signal is None and self.objective.accepts is not None:
            of_text = hidden.detach().index_select(0, batch["positions"][CONSISTENCY].teacher_index)
            signal = TeacherSignal(hidden=of_text, head=head.detached())
        return {CONSISTENCY: self.loss_of(student[CONSISTENCY], signal), AR: self._ar(student[AR], signals[AR])}

    def _ar(self, student: StudentSignal, signal: TeacherSignal | None) -> Loss:
        """Cross-entropy with the labels, or forward KL to the teacher's distributions."""
        name, objective = ("cross_entropy", CrossEntropy()) if signal is None else ("kl_forward", ForwardKL())
        loss = linear_objective(student, signal, objective)
        return replace(loss, metrics={f"ar/{name}": (loss.sum.detach(), loss.count)} if self._watching else {})

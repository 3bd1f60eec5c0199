"""Distillation from a teacher whose tokens are others than the student's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kdlib.data import Prepared
from kdlib.data.aligned import TEACHER, AlignedCollator, Reader, prepare_aligned
from kdlib.data.draft import UNSCORED
from kdlib.kernels import linear_objective
from kdlib.objectives import CrossEntropy
from kdlib.objectives.cross import ALM, CrossTokenizerObjective
from kdlib.objectives.cross.rows import sum_of_no_rows
from kdlib.trainers import setup
from kdlib.trainers.aligned_positions import aligned_positions
from kdlib.trainers.aligned_signals import AlignedSignals
from kdlib.trainers.balance import GradientBalance
from kdlib.trainers.config import DistillationConfig
from kdlib.trainers.cross_tokenizer_checks import (
    check_sharding,
    check_temperature,
    check_tokens,
    closing_token,
    match_own_tokens,
    teacher_tokenizer,
)
from kdlib.trainers.cross_tokenizer_tables import build_modules, make_tables
from kdlib.trainers.distillation import Batch, DistillationTrainer
from kdlib.trainers.final import MODULES
from kdlib.types import Loss, Positions, StudentSignal, TeacherSignal

MODULES_FILE = "objective_modules.safetensors"


class CrossTokenizerTrainer(DistillationTrainer):
    """A DistillationTrainer whose teacher reads the same text in its own tokens, rendered by its own chat template.

    loss = weight * sum / N of the objective, N its chunks (or what its docstring says) over the whole step, + cross_entropy *
    mean cross-entropy of the student's own tokens + the objective's side terms; with ``balance="gradient"`` the weights follow
    the gradients of the step before.

    objective: ALM by default, or another of ``kdlib.objectives.cross``. teacher: as for DistillationTrainer, with its own
    tokenizer; ``args.teacher_tokenizer`` names that of a cache. Rows are text, ``prompt`` + ``completion`` or ``messages``:
    token ids have no other reading. Rollouts of the student are tokenised for the teacher from their bytes.

    The log adds ``term/NAME``, the mean of each term without its weight, ``alignment/unread_ratio``, rows of which the teacher
    reads another text, so that parts have no chunk, and ``alignment/chunked_ratio``, the share of the student's scored tokens
    that lie in a chunk.
    Raises ValueError as its base class does, and for tokenizers that leave out bytes of a text.
    """

    objective: CrossTokenizerObjective
    aligns_rows = True

    def __init__(self, model: str | nn.Module, teacher: Any = None, *, objective: Any = None, **options: Any) -> None:
        objective = ALM() if objective is None else objective
        if not isinstance(objective, CrossTokenizerObjective):
            raise ValueError(f"CrossTokenizerTrainer trains objectives between tokenizers, not {type(objective).__name__}")
        if teacher is None:
            raise ValueError(f"{type(objective).__name__} needs a teacher: give one (--teacher)")
        self.balance: GradientBalance | None = None
        super().__init__(model, teacher, objective=objective, **options)
        self.teacher_signals = AlignedSignals(self.teacher, self.objective, autocast=self.accelerator.autocast)
        self.tables = make_tables(self)
        check_sharding(self.objective, self.tables, self.accelerator)
        if objective.balance == "gradient":
            self.balance = GradientBalance(self.term_weights)

    # Arguments

    def match_teacher(self, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig) -> int:
        """Each side keeps its own vocabulary."""
        check_tokens(self.teacher, args)
        check_temperature(self.teacher, self.objective)
        self.readers = (Reader(tokenizer), Reader(teacher_tokenizer(self.teacher, args)))
        match_own_tokens(self.teacher, self.readers[1].tokenizer, args)
        return len(tokenizer)

    def prepared(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig, *, training: bool
    ) -> Prepared | None:
        """Rows of both tokenizers."""
        if rows is None or isinstance(rows, Prepared):
            return rows
        found = setup.opened(rows)
        if set(TEACHER) <= set(found.column_names):
            return Prepared(dataset=found, skipped=0, reasons={}, truncated=0)
        return prepare_aligned(found, *self.readers, **setup.preparation(args, training=training))

    def check_teacher_rows(self) -> None:
        """ValueError for rows that a cached teacher does not know, under the ids of its own tokens."""
        setup.check_cached(self.teacher, *map(of_teacher, (self.train_rows, self.eval_rows)))

    def collator(self, tokenizer: PreTrainedTokenizerBase, *, flatten: bool) -> AlignedCollator:
        """Batches of the student's tokens with the teacher's beside them."""
        student, teacher = self.readers
        return AlignedCollator(student=student, teacher=teacher, closing=closing_token(teacher.tokenizer))

    def extend_student(self, student: nn.Module, args: DistillationConfig) -> None:
        """Modules of the objective are trained and checkpointed with the student, and left out of final/."""
        made = build_modules(self, student, seed=args.seed)
        if made is not None:
            student.add_module(MODULES, made)

    # The step

    def positions(self, batch: Batch) -> dict[str, Positions]:
        """The chunks of the objective and its side terms, and the student's own tokens for cross-entropy."""
        rows = aligned_positions(batch)
        aligned = replace(rows, total=self.objective.total(rows))
        own = replace(rows, chunk=None, chunks=0, other=None)
        return {name: own if name == "cross_entropy" else aligned for name in self.term_weights}

    @property
    def term_weights(self) -> dict[str, float]:
        """The weights of all terms as they are given."""
        objective = self.objective
        weights = {"distill": objective.weight, **objective.side_weights}
        return {**weights, "cross_entropy": objective.cross_entropy} if objective.cross_entropy else weights

    def term_weight(self, term: str) -> float:
        """The weight of a term's mean, given or balanced."""
        return self.objective_state.get(f"weight.{term}", self.term_weights[term])

    def terms(self, model: nn.Module, batch: Batch, signals: Mapping[str, TeacherSignal | None]) -> dict[str, Loss]:
        """All terms from one pass of the student."""
        where: dict[str, Positions] = batch["positions"]
        every = where.get("cross_entropy", where["distill"])
        student = self.student_signal(model, batch, every, layers=self.objective.layers)
        found = self._distilled(_at(student, where["distill"]), signals["distill"])
        if "cross_entropy" in where:
            found["cross_entropy"] = linear_objective(self._watched(student, "cross_entropy"), None, CrossEntropy())
        if not self._watching:
            return found
        means = {f"term/{name}": (loss.sum.detach(), loss.count) for name, loss in found.items() if loss.count}
        shown = {**found["distill"].metrics, **means, **alignment_metrics(batch)}
        return {**found, "distill": replace(found["distill"], metrics=shown)}

    def _distilled(self, student: StudentSignal, teacher: TeacherSignal | None) -> dict[str, Loss]:
        names, total = ("distill", *self.objective.side_weights), student.positions.denominator
        if not total:
            return dict.fromkeys(names, Loss(sum=self._zero(student), count=0))
        found = {"distill": self.objective(self._watched(student, "distill"), teacher, self.tables)}
        for name in names[1:]:
            sides = self.objective.side_terms(self._watched(student, name), teacher, self.tables)
            found[name] = sides[name]
        return found

    def _zero(self, student: StudentSignal) -> Tensor:
        """0 that depends on all that is trained, as DDP waits for the gradient of each parameter."""
        modules = () if self.tables.modules is None else self.tables.modules.parameters()
        zero = sum_of_no_rows(student)
        return torch.stack([zero, *(x[:0].sum().to(zero.dtype) for x in modules)]).sum()

    def _watched(self, student: StudentSignal, term: str) -> StudentSignal:
        if self.balance is None:
            return student
        return replace(student, hidden=self.balance.watched(student.hidden, term))

    def after_step(self) -> None:
        """The weights of the next step, from the gradients of this one."""
        super().after_step()
        if self.balance is not None:
            squares = self.accelerator.reduce(self.balance.taken(self.accelerator.device), reduction="sum")
            self.objective_state = self.balance.update(self.objective_state, squares)

    # Resuming

    def begin(self) -> None:
        """The balance and the objective's modules, new or from the checkpoint."""
        directory = None if self._resumed_state is None else self._resumed_state["directory"]
        super().begin()
        if self.balance is not None and directory is None:
            self.objective_state = self.balance.init_state()
        if self.tables.modules is not None and directory is not None:
            self.tables.modules.load_state_dict(load_file(directory / MODULES_FILE, device=str(self.accelerator.device)))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """With the objective's modules, which an adapter's checkpoint does not hold."""
        if self.tables.modules is not None and self.args.should_save:
            directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            directory.mkdir(parents=True, exist_ok=True)
            save_file(self.tables.modules.state_dict(), directory / MODULES_FILE)
        super()._save_checkpoint(model, trial)


def of_teacher(rows: Prepared | None) -> Prepared | None:
    """The rows under the ids that they have in the teacher's tokens."""
    if rows is None:
        return None
    named = rows.dataset.select_columns("teacher_sample_id").rename_column("teacher_sample_id", "sample_id")
    return replace(rows, dataset=named)


def _at(student: StudentSignal, positions: Positions) -> StudentSignal:
    """The student at ``positions``, which are among its own."""
    if len(positions) == len(student.positions):
        return replace(student, positions=positions)
    rows = torch.searchsorted(student.positions.index, positions.index)
    return replace(student, hidden=student.hidden[rows], positions=positions)


def alignment_metrics(batch: Batch) -> dict[str, tuple[Tensor, int]]:
    """Rows that differ for the teacher, and the student's scored tokens that lie in a chunk."""
    chunk = batch["positions"]["distill"].chunk
    scored = (batch["labels"] != UNSCORED).any(1)  # others only fill a batch
    return {
        "alignment/unread_ratio": ((batch["unread"] & scored).float().sum(), int(scored.sum())),
        "alignment/chunked_ratio": ((chunk >= 0).float().sum(), len(chunk)),
    }

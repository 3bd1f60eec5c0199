"""The trainer that every method of kdlib subclasses: named terms, counted globally, computed inside the wrapper's forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerBase, PrinterCallback, ProgressCallback, TrainerCallback, set_seed

from kdlib.data.collate import DistillationCollator
from kdlib.data.positions import causal_positions
from kdlib.head import Head
from kdlib.kernels import linear_objective
from kdlib.models import check_head, hidden_states
from kdlib.objectives import ForwardKL, Objective, RowObjective
from kdlib.serving import ServerAwayError
from kdlib.teachers import resolve_teacher
from kdlib.trainers import setup
from kdlib.trainers.callbacks import MetricsWriter, Progress, StepHooks, StopOnSignal
from kdlib.trainers.choosing import step_rows
from kdlib.trainers.config import DistillationConfig
from kdlib.trainers.final import save_final
from kdlib.trainers.meters import Stopwatch, Sums
from kdlib.trainers.on_policy import OnPolicy
from kdlib.trainers.pairs_checks import check_pairs
from kdlib.trainers.redirect import inside_forward
from kdlib.trainers.repeats import RepeatSampler, as_rows
from kdlib.trainers.resuming import AWAY, TOTALS, ResumableTrainer
from kdlib.trainers.scoring import TeacherSignals
from kdlib.trainers.step_rows import Places, prepared_with_columns
from kdlib.types import Loss, Positions, StudentSignal, Teacher, TeacherSignal

Batch = dict[str, Any]


class DistillationTrainer(ResumableTrainer):
    """Trains a student on a teacher's distributions: loss = sum over terms of weight * sum_k / N_k, N_k that of the whole step.

    model: the student, a path, Hub id or loaded causal language model.
    teacher: a path, Hub id, loaded model, directory made by ``kdlib cache``, or a Teacher; None for objectives without one.
    objective: the loss, ForwardKL by default. args: DistillationConfig.
    train_dataset, eval_dataset: rows (``text``, ``prompt`` + ``completion``, ``messages`` or token ids) as a Dataset, a list
    or a path; prepared datasets pass through. processing_class: the tokenizer, by default the student's.
    quantization_config, peft_config: QLoRA and LoRA of the student.

    Subclasses override ``positions`` and ``terms``, and ``prepare`` for a step's randomness and global choices.
    Raises ValueError when teacher, objective, tokenizers or data do not fit, before anything is written.
    """

    selects_rows = False  # whether ``prepare`` chooses rows for SelectiveKL
    masks_rows = False  # whether ``prepare`` masks rows for a DiffusionObjective
    transports_rows = False  # whether the loss is Sinkhorn's beside that of its divergence
    pairs_rows = False  # whether rows are pairs of answers, for REDI
    aligns_rows = False  # whether the teacher reads rows in tokens of its own, for a CrossTokenizerObjective
    loss_is_scaled_for_ga = True  # every micro-batch's loss is already its share of the step's

    def __init__(
        self,
        model: str | nn.Module,
        teacher: str | nn.Module | Teacher | None = None,
        *,
        objective: Objective | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Dataset | list[dict[str, Any]] | str | None = None,
        eval_dataset: Dataset | list[dict[str, Any]] | str | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        data_collator: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: PeftConfig | None = None,
    ) -> None:
        args = args or DistillationConfig(output_dir=setup.default_output_dir(model))
        set_seed(args.seed)
        tokenizer = processing_class or setup.student_tokenizer(model, args)
        self.objective = setup.checked_objective(
            objective or ForwardKL(),
            selects_rows=self.selects_rows,
            masks_rows=self.masks_rows,
            transports_rows=self.transports_rows,
            aligns_rows=self.aligns_rows,
        )
        check_pairs(self.objective, args, pairs_rows=self.pairs_rows)
        self.teacher = resolve_teacher(teacher, args.teacher_options)
        setup.check_pair(self.teacher, self.objective)
        self.vocab_size = self.match_teacher(tokenizer, args)
        self.train_rows = self.prepared(train_dataset, tokenizer, args, training=True)
        self.eval_rows = self.prepared(eval_dataset, tokenizer, args, training=False)
        for rows in (self.train_rows, self.eval_rows):
            setup.check_labels(rows, self.vocab_size)
        self.check_teacher_rows()
        setup.check_rollouts(self.teacher, self.objective, args)
        self.step_rows = step_rows(self.train_rows, args, teacher=self.teacher)
        student = setup.student(model, args, quantization_config=quantization_config, peft_config=peft_config)
        self.check_student(student)
        self.extend_student(student, args)
        setup.check_reading(student, self.teacher, masks_rows=self.masks_rows)
        self.published_dtype = setup.published_dtype(model, args)
        attention: str | None = student.config._attn_implementation  # type: ignore[union-attr, assignment]
        flat = args.packing and "flash" in (attention or "")
        super().__init__(
            model=student,
            args=args,
            data_collator=data_collator or self.collator(tokenizer, flatten=flat),
            train_dataset=self._loaded_rows(args),
            eval_dataset=None if self.eval_rows is None else self.eval_rows.dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        setup.check_parallelism(self.args, self.accelerator, self.teacher)
        setup.place(self.teacher, self.accelerator.device)
        for teacher in setup.self_teachers(self.teacher):
            teacher.bind_student(self.model, dtype=args.compute_dtype)
        self.teacher_signals = TeacherSignals(self.teacher, self.objective, autocast=self.accelerator.autocast)
        self.on_policy = OnPolicy(self) if args.on_policy_fraction else None
        self.objective_state: dict[str, float] = {}
        self.totals = dict.fromkeys(TOTALS, torch.zeros((), dtype=torch.float64))
        self._resumed_state: dict[str, Any] | None = None
        self._watching, self._window, self._evaluated, self._watch = False, Sums(), Sums(), Stopwatch()
        self._step_loss, self._window_start, self._generated = torch.zeros(()), (0.0, 0.0), 0
        self.signals_received = StopOnSignal()
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        for callback in (StepHooks(self), MetricsWriter(), self.signals_received, *([] if args.disable_tqdm else [Progress()])):
            self.add_callback(callback)

    # What a method may make of its arguments

    def match_teacher(self, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig) -> int:
        """What the student's logits are cut to; ValueError for a teacher that speaks other tokens."""
        return setup.match_tokenizers(self.teacher, tokenizer, args)

    def prepared(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig, *, training: bool
    ) -> setup.Prepared | None:
        """Token rows of what users give as a dataset; those of evaluation are never packed."""
        if training and args.kept_columns:
            return prepared_with_columns(rows, tokenizer, args, columns=args.kept_columns)
        return setup.prepared(rows, tokenizer, args, packing=args.packing and training, training=training)

    def check_teacher_rows(self) -> None:
        """ValueError before training for rows that the teacher does not know."""
        setup.check_cached(self.teacher, self.train_rows, self.eval_rows)

    def collator(self, tokenizer: PreTrainedTokenizerBase, *, flatten: bool) -> Any:
        """What makes batches of prepared rows."""
        return DistillationCollator(tokenizer.pad_token_id, flatten=flatten)

    def extend_student(self, student: nn.Module, args: DistillationConfig) -> None:
        """Gives the student what the objective trains with it."""

    def _loaded_rows(self, args: DistillationConfig) -> Any:
        """What the loader goes through in training: rows, or the places in which a step's chosen rows stand."""
        if self.step_rows is not None:
            return Places(self.step_rows.places)
        return None if self.train_rows is None else setup.repeated(self.train_rows.dataset, args)

    # What a method defines

    def positions(self, batch: Batch) -> dict[str, Positions]:
        """The scored positions of each term; the shift by one happens here and nowhere else."""
        return {"distill": causal_positions(batch)}

    def terms(self, model: nn.Module, batch: Batch, signals: Mapping[str, TeacherSignal | None]) -> dict[str, Loss]:
        """The terms' sums over this micro-batch, inside the wrapper's forward; ``batch["positions"]`` holds the positions."""
        student = self.student_signal(model, batch, batch["positions"]["distill"], layers=self.objective.layers)
        return {"distill": self.loss_of(student, signals["distill"])}

    def student_signal(
        self, model: nn.Module, batch: Batch, positions: Positions, *, layers: tuple[int, ...] = ()
    ) -> StudentSignal:
        """What ``model`` says at ``positions``: hidden states [N, D] and the head that makes logits of them."""
        with self.accelerator.autocast():
            hidden, features = hidden_states(model, batch, layers=layers)
        head = Head.of(model, vocab_size=self.vocab_size, dtype=self.args.compute_dtype)
        rows = hidden.flatten(0, 1).index_select(0, positions.index)
        return StudentSignal(hidden=rows, head=head, positions=positions, features=features)

    def check_student(self, student: nn.Module) -> None:
        """ValueError for a student whose logits ``Head`` cannot make; called before anything is written."""
        check_head(student, role="student")

    def term_weight(self, term: str) -> float:
        """The weight of a term's mean in the step's loss."""
        return 1.0

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """Once per optimizer step, all its micro-batches with their rollouts, before rows are counted: masks, selection."""
        return batches

    def loss_of(self, student: StudentSignal, teacher: TeacherSignal | None) -> Loss:
        """The objective as it stands in this step, with metrics on the steps that are logged."""
        objective = self.objective.bind(self.objective_state)
        if isinstance(objective, RowObjective):
            return linear_objective(student, teacher, objective, metrics=self._watching)
        return objective(student, teacher)

    def signals(self, batch: Batch) -> dict[str, TeacherSignal | None]:
        """The teacher's signal for every term."""
        with self._watch.part("teacher"):
            return self.teacher_signals(batch)

    # The step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], dict[str, Tensor]]:
        """The step's micro-batches with their positions, and the rows of each term over all of them and all ranks."""
        self._watching = self._logs_next_step()
        self._watch.restart(exact=self._watching)
        batches, failure = self._step_batches(epoch_iterator, num_batches)
        if self.waits_for_engines:
            self._stop_if_away(failure, device)
        counts = self._global_counts(batches, device)
        # a teacher that was asked before the update is no part of it: after_step takes away all of the teacher's seconds
        self._step_start = self._watch.now() - self._watch.seconds().get("time/teacher", 0.0)
        return batches, counts

    def _step_batches(self, iterator: Iterator[Batch], num_batches: int) -> tuple[list[Batch], Exception | None]:
        """Everything of the step that comes before its first forward pass, or the engine that was not there for it."""
        size = self.args.train_batch_size

        def pull() -> list[Batch]:
            taken: list[Batch] = []
            for _, batch in zip(range(num_batches), iterator, strict=False):
                if self.step_rows is not None and not taken:
                    self.step_rows.advance()
                # one after another: only while a loader's last batch is the newest does it say that it is at its end
                taken.append(self._unrepeated(self._chosen(batch), size=size))
            return taken

        try:
            if self.on_policy is None:
                with self._watch.part("data"):
                    batches = pull()
            else:
                batches = self._rolled_out(pull)
            with self._watch.part("data"):
                batches = [b if "positions" in b else {**b, "positions": self.positions(b)} for b in self.prepare(batches)]
            if self.waits_for_engines:
                with self._watch.part("teacher"):
                    batches = self.teacher_signals.all_of(batches)
        except AWAY as error:
            return [], error
        return batches, None

    def _chosen(self, batch: Batch) -> Batch:
        """The batch, with the rows that its step chooses where the loader gave places."""
        if self.step_rows is None:
            return batch
        rows = self.step_rows.at(batch["rows"])
        return as_rows(rows) if self.on_policy is not None else self._on_device(rows)

    def _on_device(self, rows: list[dict[str, Any]]) -> Batch:
        made: Batch = send_to_device(self.data_collator(rows), self.accelerator.device)
        return made

    def _rolled_out(self, pull: Callable[[], list[Batch]]) -> list[Batch]:
        assert self.on_policy is not None
        step = self.on_policy.next(pull, step=self.state.global_step + 1)
        for name, seconds in step.seconds.items():
            self._watch.add(name, seconds)
        self._generated = step.counts.tokens
        self._window.add(step.counts.metrics(self.accelerator.device))
        if self.on_policy.mixture is not None:
            self.on_policy.mixture.update(step.batches, self.accelerator)
        return step.batches

    @property
    def waits_for_engines(self) -> bool:
        """Whether a server or an engine outside of this process's models takes part, which could be away."""
        return self.teacher_signals.served or (self.on_policy is not None and self.args.rollout.engine != "hf")

    def _stop_if_away(self, failure: Exception | None, device: torch.device) -> None:
        """Stops all ranks before the same step when one is without its engine: the model is whole, and resumes from here."""
        away = torch.tensor(float(failure is not None), device=device)
        if float(self.accelerator.reduce(away, reduction="sum")):
            raise failure or ServerAwayError("another process has lost its engine; the same command resumes")

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """This micro-batch's share of the step's loss, times the number of ranks because DDP and FSDP average over them."""
        assert not return_outputs, "logits of the whole batch are never built: evaluate with kdlib.eval"
        shares = [
            self.term_weight(name) * loss.sum / num_items_in_batch[name].clamp(min=1)
            for name, loss in self._losses(model, inputs).items()
        ]
        total = torch.stack(shares).sum()
        self._step_loss = self._step_loss.to(total.device) + total.detach()
        return total * self.accelerator.num_processes

    def _losses(self, model: nn.Module, batch: Batch) -> dict[str, Loss]:
        found: dict[str, Loss] = {}
        given = batch.pop("signals", None)
        outside = self.signals(batch) if given is None and not self.teacher_signals.inside_forward else given
        unwrapped = self.accelerator.unwrap_model(model)

        def forward(batch: Batch) -> dict[str, Tensor]:
            found.update(self.terms(unwrapped, batch, self.signals(batch) if outside is None else outside))
            return {name: loss.sum for name, loss in found.items()}

        sums = inside_forward(model, unwrapped, forward, batch)
        for loss in found.values():
            self._window.add(loss.metrics)
        return {name: Loss(sum=sums[name], count=loss.count, metrics=loss.metrics) for name, loss in found.items()}

    def _global_counts(self, batches: list[Batch], device: torch.device) -> dict[str, Tensor]:
        names = batches[0]["positions"] if batches else ()
        local = {name: sum(batch["positions"][name].denominator for batch in batches) for name in names}
        seen = sum(batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum() for batch in batches)
        known = [*local.values(), self.signals_received.received is not None, self._generated]
        counts = torch.tensor(known, dtype=torch.float64, device=device)
        *rows, signals, generated, seen = self.accelerator.reduce(
            torch.cat([counts, counts.new_zeros(1) + seen]), reduction="sum"
        )
        for name, found in zip(TOTALS, (torch.stack(rows).sum(), seen, generated), strict=True):
            self.totals[name] = self.totals[name].to(device) + found
        if self.accelerator.num_processes > 1:
            self.signals_received.agreed = bool(signals)  # seen by all ranks before the same step
        return dict(zip(local, torch.stack(rows).float(), strict=True))

    def after_step(self) -> None:
        """The objective's state moves with the global loss, once per optimizer step."""
        self._watch.add("update", self._watch.now() - self._step_start - self._watch.seconds().get("time/teacher", 0.0))
        for teacher in setup.self_teachers(self.teacher):
            teacher.after_step()
        if self.objective_state:
            loss = self.accelerator.reduce(self._step_loss, reduction="sum").item()
            self.objective_state = self.objective.update(self.objective_state, loss, self.state.global_step)
        self._step_loss = torch.zeros((), device=self._step_loss.device)
        if self.step_rows is not None:
            self.step_rows.chooser.after_step(self, self.state.global_step)

    # Logging

    def _logs_next_step(self) -> bool:
        if self.args.logging_strategy != "steps":
            return self.args.logging_strategy != "no"
        step = self.state.global_step + 1
        return step % max(1, self.state.logging_steps) == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds what a distiller wants to the Trainer's log lines; ValueError when the loss is not finite."""
        if "loss" in logs and "grad_norm" in logs:
            self._window.add(self.teacher_signals.bad_rows())
            logs |= self._window.means(self.accelerator) | self._watch.seconds() | self._throughput()
            shown = {key: value for key, value in self.objective_state.items() if key.split(".")[-1] == "t" or "weight." in key}
            logs |= {f"objective/{key}": value for key, value in shown.items()}
            logs |= {} if self.step_rows is None else self.step_rows.chooser.metrics
            logs |= {} if self.on_policy is None or self.on_policy.mixture is None else self.on_policy.mixture.metrics
            if self.on_policy is not None and self.is_world_process_zero():
                self.on_policy.log.logged(logs, step=self.state.global_step)
            if not math.isfinite(logs["loss"]):
                raise ValueError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower learning_rate or look at the rows"
                    " (--preview 3); a reverse divergence is infinite where the teacher gives a token no mass"
                )
        super().log(logs, start_time)

    def _throughput(self) -> dict[str, float]:
        now, totals = self._watch.now(), self.token_totals()
        start, before = self._window_start
        self._window_start = (now, totals["seen_tokens"])
        return totals | self.passes(totals) | {"tokens_per_second": (totals["seen_tokens"] - before) / (now - start)}

    def passes(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Tokens that each model has read or written, made of ``totals``, where methods differ in it."""
        return {}

    # Loaders and ends

    def close(self) -> None:
        """Ends engines that this trainer started."""
        if self.on_policy is not None:
            self.on_policy.close()

    def get_train_dataloader(self) -> Any:
        """Rows as they are where rollouts or a choice come first, collated batches otherwise."""
        if self.on_policy is None and self.step_rows is None:
            return super().get_train_dataloader()
        collate: Any = self.data_collator
        self.data_collator: Any = as_rows
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.step_rows is not None:
            return SequentialSampler(self.train_dataset)
        if self.args.num_generations > 1:
            return RepeatSampler(
                len(self.train_dataset), times=self.args.num_generations, seed=self.args.data_seed or self.args.seed
            )
        return super()._get_train_sampler(train_dataset)

    def save_final(self, directory: str | Path) -> Path:
        """A directory that transformers, vLLM and lm-eval load as it is; every rank calls this, rank 0 writes."""
        return save_final(self, Path(directory))

    def steps_per_epoch(self) -> int:
        """Optimizer steps of one pass over the training rows."""
        batches = len(self.get_train_dataloader())
        return max(1, math.ceil(batches / self.args.gradient_accumulation_steps))

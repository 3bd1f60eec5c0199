"""Training masked diffusion language models: from text, and towards fewer decoding steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from kdlib.data import load_rows
from kdlib.data.diffusion import DiffusionCollator
from kdlib.data.draft import UNSCORED
from kdlib.diffusion.convert import as_diffusion, check_diffusion
from kdlib.head import Head
from kdlib.models import evaluating, hidden_states, inner
from kdlib.objectives import CertaintyForcing, MaskedELBO
from kdlib.objectives.diffusion.base import Corruption, DiffusionObjective
from kdlib.teachers import SelfTeacher, resolve_teacher
from kdlib.trainers import setup
from kdlib.trainers.diffusion_checks import check_objective, check_rows, check_teacher, student_spec, teacher_layout
from kdlib.trainers.diffusion_config import DiffusionConfig
from kdlib.trainers.diffusion_layout import Layout
from kdlib.trainers.diffusion_views import draws_of, on_device, positions_of, rows_of, stacked
from kdlib.trainers.distillation import Batch, DistillationTrainer
from kdlib.trainers.drawing import drawn_tokens
from kdlib.trainers.scoring import of_terms
from kdlib.trainers.turns import stop_ids
from kdlib.types import Loss, StudentSignal, TeacherSignal


class DiffusionTrainer(DistillationTrainer):
    """Masked diffusion training: loss = sum_k w_k sum_k / N_k over the terms of a DiffusionObjective, MaskedELBO by default.

    model: a masked diffusion model, or an auto-regressive one that becomes one (attention both ways; ``mask_token`` where its
    tokenizer has none). teacher: for objectives that compare with one. train_dataset: rows as for DistillationTrainer, or of
    ``kdlib trajectories diffusion``; what is learnt of them is masked, the rest never.

    All views of a row (two complementary masks, for example) are read in one forward pass. What is masked follows from seed,
    step and row alone. Terms are means over the step's rows; a certainty term is one within each micro-batch, weighted by that
    micro-batch's share of the rows, because its own count depends on the logits.
    Raises ValueError for objectives of other trainers, rows without what a way of masking needs, and models that see no later
    tokens where they should.
    """

    args: DiffusionConfig
    objective: DiffusionObjective
    masks_rows = True
    makes_models = True  # whether an auto-regressive model becomes a diffusion model here

    def __init__(
        self,
        model: str | nn.Module,
        teacher: Any = None,
        *,
        objective: Any = None,
        args: DiffusionConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **options: Any,
    ) -> None:
        args = args or DiffusionConfig(output_dir=setup.default_output_dir(model))
        objective = check_objective(objective or self.default_objective())
        tokenizer = processing_class or setup.student_tokenizer(model, args)
        adapted = options.get("peft_config") is not None
        self.spec = student_spec(model, tokenizer, args, objective=objective, makes=self.makes_models, adapted=adapted)
        teacher = resolve_teacher(teacher, args.teacher_options) or self.default_teacher(objective, options)
        check_teacher(teacher, objective, self.spec)
        self.layout = Layout(spec=self.spec, clean=args.context == "clean" and self.spec.attention == "block_causal")
        self.teacher_layout = teacher_layout(teacher, objective, self.spec)
        self.masking = args.masks(objective.masking, block_length=args.blocks(self.spec))
        if isinstance(train_dataset, str):
            train_dataset = load_rows(train_dataset, tokenizer=tokenizer)
        super().__init__(
            model,
            teacher,
            objective=objective,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            data_collator=DiffusionCollator(
                tokenizer.pad_token_id,
                eos_token_id=self.spec.eos_token_id,
                end_token_ids=stop_ids(self.spec.eos_token_id, tokenizer, args.chat_template_kwargs or {}),
                eos_padding=self.spec.eos_padding,
                block_length=args.blocks(self.spec),
                blocks_from=self.spec.blocks_from,
                response_length=args.response_length,
                max_length=args.max_length,
            ),
            **options,
        )
        for rows in (self.train_rows, self.eval_rows):
            check_rows(rows, self.masking, mask_token_id=self.spec.mask_token_id)

    def default_objective(self) -> DiffusionObjective:
        return MaskedELBO()

    def default_teacher(self, objective: DiffusionObjective, options: Mapping[str, Any]) -> Any:
        """The student itself for objectives that compare with a teacher: below its adapter where that is what it was."""
        if objective.accepts is None:
            return None
        if options.get("peft_config") is not None and not objective.renews_teacher:
            return SelfTeacher("adapter_off")
        return SelfTeacher("copy" if objective.copies_student else "student")

    def set_decoder(self, decoder: Any) -> None:
        """Writes how the trained model decodes into its configuration (``DiffusionDecoder.to_json``)."""
        config: Any = inner(self.accelerator.unwrap_model(self.model)).config
        config.diffusion = {**config.diffusion, "decoding": decoder.to_json()}

    def check_student(self, student: nn.Module) -> None:
        """The student becomes a diffusion model here, before it is checked."""
        as_diffusion(student, self.spec)
        super().check_student(student)
        check_diffusion(student, self.spec, role="student")

    @property
    def _bound(self) -> DiffusionObjective:
        """The objective as it stands in this step."""
        bound = self.objective.bind(self.objective_state)
        assert isinstance(bound, DiffusionObjective)
        return bound

    def term_weight(self, term: str) -> float:
        return self.objective.weights.get(term, 1.0)

    def after_step(self) -> None:
        """A teacher of the student's past is renewed where the objective says so."""
        super().after_step()
        if self.objective.refreshes(self.state.global_step):
            for teacher in setup.self_teachers(self.teacher):
                teacher.refresh()

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """The rows of each batch as they are masked in this step."""
        step = self.state.global_step + 1
        progress = (step - 1) / max(1, self.state.max_steps - 1)
        return [self._masked(batch, step=step, progress=progress) for batch in super().prepare(batches)]

    def evaluation_batch(self, batch: Batch) -> Batch:
        """As in training, with the draws of step 0 and the masks of its end."""
        return self._masked(batch, step=0, progress=1.0)

    def _masked(self, batch: Batch, *, step: int, progress: float) -> Batch:
        device = self.accelerator.device
        batch = send_to_device(batch, "cpu")
        batch["rank"] = batch["rank"].masked_fill(batch["labels"] == UNSCORED, -1)  # rows that another rank has already
        draws = draws_of(batch, seed=self.args.seed, step=step)
        noise = self.masking.noise(rows_of(batch, self.spec), draws, progress=progress)
        corruption = self._bound.corrupt(noise)
        ids = [self._with_masks(batch["input_ids"], view.masked) for view in corruption.student]
        made = stacked([self.layout.inputs(view, batch) for view in ids])
        if corruption.teacher:
            made |= stacked(self._teacher_views(batch, corruption, step=step), prefix="teacher_")
        positions = positions_of(batch, corruption, student=self.layout, teacher=self.teacher_layout)
        return {
            **send_to_device(made, device),
            "sample_id": batch["sample_id"],
            "positions": on_device(positions, device),
        }

    def _with_masks(self, ids: Tensor, masked: Tensor) -> Tensor:
        assert self.spec.mask_token_id is not None
        return ids.masked_fill(masked, self.spec.mask_token_id)

    def _teacher_views(self, batch: Batch, corruption: Corruption, *, step: int) -> list[Batch]:
        """What the teacher reads, view after view, because it may draw tokens of one from what it says on the one before."""
        known, views = batch["input_ids"], list[Batch]()
        for view in corruption.teacher:
            if view.drawn is not None and bool(view.drawn.any()):
                known = self._drawn(batch, views[-1], view.drawn, known=known, step=step, stream=len(views))
            views.append(self.teacher_layout.inputs(self._with_masks(known, view.masked), batch))
        return views

    @torch.no_grad()
    def _drawn(self, batch: Batch, read: Batch, drawn: Tensor, *, known: Tensor, step: int, stream: int) -> Tensor:
        """``known`` [B, S] with the teacher's own tokens where ``drawn``."""
        draws = draws_of(batch, seed=self.args.seed, step=step, stream=stream)
        assert self.teacher is not None
        model = self.accelerator.unwrap_model(self.model)
        with evaluating(model), self.accelerator.autocast():
            return drawn_tokens(
                self.teacher,
                send_to_device(read, self.accelerator.device),
                where=drawn,
                read_at=self.teacher_layout.read_at(batch),
                known=known,
                uniform=draws.token.gather(1, batch["rank"].clamp(min=0)),
                mask_token_id=self.spec.mask_token_id,
            )

    def signals(self, batch: Batch) -> dict[str, TeacherSignal | None]:
        """One pass of the teacher for all terms that read it."""
        where = {name: of for name, of in batch["positions"].items() if of.teacher_index is not None}
        found: dict[str, TeacherSignal | None] = dict.fromkeys(batch["positions"])
        if not where:
            return found
        assert self.teacher is not None
        with self._watch.part("teacher"), self.accelerator.autocast():
            return found | of_terms(self.teacher, batch, where)

    def terms(self, model: nn.Module, batch: Batch, signals: Mapping[str, TeacherSignal | None]) -> dict[str, Loss]:
        """The objective's terms on all views, from one forward pass."""
        with self.accelerator.autocast():
            hidden = hidden_states(model, batch)[0].flatten(0, 1)
        head = Head.of(model, vocab_size=self.vocab_size, dtype=self.args.compute_dtype)
        student = {
            name: StudentSignal(hidden=hidden.index_select(0, where.index), head=head, positions=where)
            for name, where in batch["positions"].items()
        }
        found = self._bound.terms(student, signals, metrics=self._watching)
        return {name: self._counted(name, loss, count=batch["positions"][name].denominator) for name, loss in found.items()}

    def _counted(self, name: str, loss: Loss, *, count: int) -> Loss:
        """A term with what its sum is divided by, and on logged steps with its own mean among the metrics."""
        own = {name: (loss.sum.detach(), count)} if self._watching else {}
        return replace(loss, count=count, metrics={**loss.metrics, **own})


class DiffusionDistillationTrainer(DiffusionTrainer):
    """Distils a masked diffusion model towards fewer decoding steps: CertaintyForcing by default, on its own decoded text.

    model: a masked diffusion model. train_dataset: rows of ``kdlib trajectories diffusion``, or any rows. See DiffusionTrainer.
    """

    makes_models = False

    def default_objective(self) -> DiffusionObjective:
        return CertaintyForcing()

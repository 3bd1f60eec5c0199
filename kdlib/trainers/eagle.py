"""Training EAGLE-3 heads with the training-time test: k unrolled steps, each a named term."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kdlib.data import Prepared
from kdlib.data.draft import UNSCORED
from kdlib.drafts import formats
from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.drafts.eagle3_config import Eagle3Config, check_feature_layers
from kdlib.drafts.vocabulary import DraftVocabulary, draft_vocabulary
from kdlib.head import Head
from kdlib.kernels import linear_objective
from kdlib.objectives import ForwardKL, RowObjective
from kdlib.trainers import setup
from kdlib.trainers.distillation import Batch, DistillationTrainer
from kdlib.trainers.eagle_config import EagleConfig
from kdlib.trainers.eagle_target import EagleTarget
from kdlib.trainers.eagle_terms import TargetRows, step_metrics, step_positions
from kdlib.types import Loss, Positions, StudentSignal, TeacherSignal

__all__ = ["EagleConfig", "EagleTrainer"]

logger = logging.getLogger("kdlib")


class EagleTrainer(DistillationTrainer):
    """Trains an Eagle3Draft q on its target p: loss = sum_j step_decay^j mean_t D(p(. | x_<t+2+j), q_j(. | t)).

    model: None for a new head, else an Eagle3Draft or a head's directory or Hub id (EAGLE or speculators format) to go on from.
    teacher: the target, a path or a loaded model; with ``features_dir`` at most its name. One forward pass of the target a
    batch gives the features and the rows that all steps are compared with.
    objective: any row objective, ForwardKL by default, on the draft's vocabulary with p renormalised there. Rows whose
    likeliest token under p is outside of it have weight 0 and still count in N_j, as in EAGLE's own code.

    The log adds ``acceptance/step_j`` = sum min(p, q) over the target's whole vocabulary, ``accuracy/step_j`` of the argmax
    (both count what is outside as lost) and ``outside_draft_vocabulary``. ``scored_tokens`` counts the rows of all steps.
    Raises ValueError as its base class does, and where head and target do not fit.
    """

    args: EagleConfig

    def __init__(
        self,
        model: str | Path | Eagle3Draft | None = None,
        teacher: Any = None,
        *,
        objective: RowObjective | None = None,
        args: EagleConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **options: Any,
    ) -> None:
        args = args or EagleConfig(output_dir="eagle3-distillation")
        if not isinstance(objective or ForwardKL(), RowObjective):
            raise ValueError(f"an EAGLE-3 head is trained with a row objective, not {type(objective).__name__}")
        self.target = EagleTarget.of(teacher, args)
        tokenizer = processing_class or self.target.tokenizer
        if tokenizer is None:
            raise ValueError("the target has no tokenizer beside it: give processing_class")
        rows = setup.prepared(train_dataset, tokenizer, args, packing=False, training=True)
        draft = self._draft(model, rows, args)
        super().__init__(
            draft,
            self.target.teacher,
            objective=objective,
            args=args,
            train_dataset=rows,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **options,
        )
        self.target.teacher.vocab_size = self.vocab_size
        self.published_dtype = self.target.embeddings.dtype if model is None else self.published_dtype
        if self.accelerator.distributed_type == "FSDP":
            raise ValueError("an EAGLE-3 head is one layer, which FSDP would not make smaller: use ddp")
        ids = draft.vocabulary.ids
        kept = ids[ids < self.vocab_size].to(self.accelerator.device)
        self.vocabulary = DraftVocabulary(ids=kept, vocab_size=self.vocab_size)

    def _draft(self, model: str | Path | Eagle3Draft | None, rows: Prepared | None, args: EagleConfig) -> Eagle3Draft:
        """A head to go on from, or a new one for the target with the vocabulary of the rows."""
        if model is None:
            return self._new_draft(rows, args)
        draft = model if isinstance(model, Eagle3Draft) else formats.load(model).to(torch.float32)
        if draft.config.feature_layers is None:
            draft.config.feature_layers = args.feature_layers or Eagle3Config.of_target(self.target.config).feature_layers
        for name in ("draft_vocab_size", "feature_layers"):
            given, own = getattr(args, name), getattr(draft.config, name)
            if given is not None and given != own:
                raise ValueError(f"{name} of the given head is {own}, not {given}: leave it out, or start a new head")
        if not draft.config.own_embeddings:
            draft.share_embeddings(self.target.embeddings)
        return draft

    def _new_draft(self, rows: Prepared | None, args: EagleConfig) -> Eagle3Draft:
        config = Eagle3Config.of_target(
            self.target.config,
            draft_vocab_size=args.draft_vocab_size,
            feature_layers=args.feature_layers,
            **(args.head_overrides or {}),
        )
        V, DV = config.vocab_size, config.draft_vocab_size
        assert DV is not None
        if config.own_embeddings:
            raise ValueError("a new head shares its target's embeddings: leave own_embeddings and hidden_size as they are")
        if DV == V:
            vocabulary = DraftVocabulary.whole(V)
        elif rows is None:
            raise ValueError("draft_vocab_size takes the most frequent tokens of train_dataset: give one")
        else:
            vocabulary = draft_vocabulary(scored_token_counts(rows, V), DV, vocab_size=V)
            logger.info("the draft's vocabulary of %d of %d tokens covers %.4f of the scored ones", DV, V, vocabulary.covered)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            return Eagle3Draft.for_target(
                config, embeddings=self.target.embeddings, head=self.target.head, vocabulary=vocabulary
            )

    def check_student(self, student: nn.Module) -> None:
        """ValueError where the head was made for another target."""
        assert isinstance(student, Eagle3Draft)
        own, text = student.config, self.target.config.get_text_config()
        pairs = {"vocab_size": text.vocab_size, "target_hidden_size": text.hidden_size}
        for name, expected in pairs.items():
            if getattr(own, name) != expected:
                raise ValueError(
                    f"the head has {name} {getattr(own, name)}, the target {expected}: it was made for another one"
                )
        check_feature_layers(own.feature_layers or (), num_layers=text.num_hidden_layers)

    def positions(self, batch: Batch) -> dict[str, Positions]:
        """Step j scores x_{t+2+j} at t."""
        if "teacher_input_ids" in batch:
            raise ValueError("rows with a teacher_prompt: an EAGLE-3 head reads the target's hidden states of its own text")
        return step_positions(batch, self.args.ttt_steps)

    def term_weight(self, term: str) -> float:
        """step_decay ** j."""
        return self.args.step_decay ** int(term.removeprefix("step_"))

    def signals(self, batch: Batch) -> dict[str, TeacherSignal | None]:
        """{"target": features and the rows of step 0, among which are those of all steps}: one forward pass of the target."""
        first = batch["positions"]["step_0"]
        rows = Positions(index=first.teacher_index, labels=first.labels, sequence=first.sequence)
        with self._watch.part("teacher"), self.accelerator.autocast():
            return {"target": self.target.teacher.signal(batch, rows, self._layers)}

    @property
    def _layers(self) -> tuple[int, ...]:
        return tuple(self.accelerator.unwrap_model(self.model).config.feature_layers)

    def terms(self, model: nn.Module, batch: Batch, signals: Mapping[str, TeacherSignal | None]) -> dict[str, Loss]:
        """A term for each unrolled step."""
        assert isinstance(model, Eagle3Draft)
        signal = signals["target"]
        assert signal is not None
        features = torch.cat([signal.features[layer] for layer in self._layers], -1)
        with self.accelerator.autocast():
            unrolled = model.unroll(features, batch["input_ids"], steps=self.args.ttt_steps)
        head = Head.of(model, dtype=self.args.compute_dtype).sliced(len(self.vocabulary.ids))
        first = batch["positions"]["step_0"].teacher_index
        target = TargetRows.of(signal, first, vocabulary=self.vocabulary, watching=self._watching)
        return {
            name: self._term(j, hidden.flatten(0, 1).index_select(0, positions.index), head, positions, target)
            for j, (hidden, (name, positions)) in enumerate(zip(unrolled, batch["positions"].items(), strict=True))
        }

    def _term(self, j: int, hidden: Tensor, head: Head, positions: Positions, target: TargetRows) -> Loss:
        objective, rows = self.objective.bind(self.objective_state), target.at(positions)
        assert isinstance(objective, RowObjective) and target.signal.hidden is not None
        labels = self.vocabulary.draft_ids[positions.labels]
        weight = None if target.inside is None else target.inside[rows].float()
        if objective.reads_labels and weight is not None:
            weight = weight * (labels >= 0)
        student = StudentSignal(
            hidden=hidden, head=head, positions=replace(positions, labels=labels.clamp(min=0), weight=weight)
        )
        teacher = TeacherSignal(hidden=target.signal.hidden[rows], head=target.head)
        loss = linear_objective(student, None if objective.accepts is None else teacher, objective)
        if not self._watching:
            return loss
        found = step_metrics(j, hidden, head=head, target=target, rows=rows, ids=self.vocabulary.ids)
        return replace(loss, metrics=found)

    def save_final(self, directory: str | Path) -> Path:
        """The head in ``export_format``, which vLLM loads; every rank calls this, rank 0 writes."""
        if self.is_world_process_zero():
            formats.write(
                self.accelerator.unwrap_model(self.model),
                directory,
                format=self.args.export_format,
                target_name=self.target.name,
                target_architectures=tuple(self.target.config.architectures or ()),
                num_speculative_tokens=self.args.num_speculative_tokens,
                dtype=self.published_dtype,
            )
        return Path(directory)


def scored_token_counts(rows: Prepared, vocab_size: int) -> Tensor:
    """How often each target id is scored [V]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in rows.dataset.with_format("arrow").iter(batch_size=4096):
        labels = batch["labels"].combine_chunks().flatten().to_numpy()
        counts += np.bincount(labels[labels != UNSCORED], minlength=vocab_size)
    return torch.from_numpy(counts)

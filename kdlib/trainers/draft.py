"""Training a small language model to be the draft of a speculative decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.kernels import row_values
from kdlib.models import check_head, evaluating, load_model
from kdlib.objectives import SelectiveKL
from kdlib.objectives.selective import check_reference, potential, select, threshold
from kdlib.trainers.distillation import Batch, DistillationTrainer
from kdlib.trainers.resuming import AWAY
from kdlib.types import Positions


class DraftTrainer(DistillationTrainer):
    """A DistillationTrainer whose student is a draft q and whose teacher is the target p of speculative decoding.

    reference: for SelectiveKL (AdaSPEC), a model of the draft's size that was distilled from the same start: a path, Hub id or
    loaded model. The rows with the largest KL(p || q) - KL(p || reference) are kept, chosen once per optimizer step over all
    its micro-batches and ranks; which costs one more forward pass of the draft and one of the reference, counted in the log.
    Evaluation scores all rows.

    The log adds, over the whole run and all ranks, ``draft_tokens`` (read by the draft in forward passes with and without
    gradient, and its rollouts), ``target_tokens`` and ``reference_tokens``: what methods are compared by at equal cost.
    Raises ValueError for SelectiveKL without a reference and for a reference that nothing uses; otherwise as its base class.
    """

    selects_rows = True

    def __init__(
        self,
        model: str | nn.Module,
        teacher: Any = None,
        *,
        reference: str | nn.Module | None = None,
        **options: Any,
    ) -> None:
        check_reference(options.get("objective"), reference)
        super().__init__(model, teacher, **options)
        self.reference = None if reference is None else self._loaded(reference)

    def _loaded(self, reference: str | nn.Module) -> nn.Module:
        """The reference, frozen, on the student's device."""
        if self.accelerator.distributed_type == "FSDP":
            raise ValueError("SelectiveKL scores rows before the forward pass, where FSDP has the weights in parts: use ddp")
        args = self.args
        made = reference
        if isinstance(reference, str):
            made = load_model(reference, dtype=args.teacher_dtype, trust_remote_code=args.trust_remote_code)
        assert isinstance(made, nn.Module)
        check_head(made, role="reference")
        return made.eval().requires_grad_(False).to(self.accelerator.device)

    def passes(self, totals: Mapping[str, float]) -> dict[str, float]:
        seen, generated = totals["seen_tokens"], totals["generated_tokens"]
        own = self.args.rollout_source != "teacher"
        found = {"draft_tokens": seen + generated * own, "target_tokens": seen + generated * (not own)}
        if self.reference is None:
            return found
        return {**found, "draft_tokens": found["draft_tokens"] + seen, "reference_tokens": seen}

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """With SelectiveKL, the batches with the rows that are kept."""
        batches = super().prepare(batches)
        if self.reference is None:
            return batches
        batches = self._with_signals([{**batch, "positions": self.positions(batch)} for batch in batches])
        losses = [self._row_losses(batch) for batch in batches]
        every = self._gathered([potential(*pair) for pair in losses])
        if not len(every):
            return batches
        assert isinstance(self.objective, SelectiveKL)
        least = threshold(every, self.objective.fraction)
        share = float((every >= least).sum()) / len(every) if self.objective.normalize == "all" else None
        return [_kept(batch, select(*pair, least), share=share) for batch, pair in zip(batches, losses, strict=True)]

    def _with_signals(self, batches: list[Batch]) -> list[Batch]:
        """The target is asked once, for choice and loss; all ranks stop where one has lost it."""
        with self._watch.part("teacher"):
            if not self.teacher_signals.served:
                return [b if "signals" in b else {**b, "signals": self.teacher_signals(b)} for b in batches]
            failure: Exception | None = None
            try:
                batches = self.teacher_signals.all_of(batches)
            except AWAY as error:
                failure = error
        self._stop_if_away(failure, self.accelerator.device)  # before the choice, for which all ranks wait
        return batches

    @torch.no_grad()
    def _row_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """KL(p || q) of draft and of reference at a micro-batch's rows [N]; nats."""
        positions, signal = batch["positions"]["distill"], batch["signals"]["distill"]
        draft = self.accelerator.unwrap_model(self.model)
        assert self.reference is not None and isinstance(self.objective, SelectiveKL)
        with evaluating(draft):
            own, reference = (
                row_values(self.student_signal(model, batch, positions), signal, self.objective)
                for model in (draft, self.reference)
            )
        return own, reference

    def _gathered(self, deltas: list[Tensor]) -> Tensor:
        """The delta of every rank's rows, which may be of different number."""
        own = torch.cat([*deltas, torch.zeros(0, device=self.accelerator.device)]).float()
        if self.accelerator.num_processes == 1:
            return own
        counts = self.accelerator.gather(torch.tensor([len(own)], device=own.device))
        padded = torch.nn.functional.pad(own, (0, int(counts.max()) - len(own)))
        every = self.accelerator.gather(padded).reshape(len(counts), -1)
        return torch.cat([row[:count] for row, count in zip(every, counts.tolist(), strict=True)])


def _kept(batch: Batch, keep: Tensor, *, share: float | None) -> Batch:
    """The batch with the kept rows of its term; ``share`` becomes the weight of each."""
    positions: Positions = batch["positions"]["distill"].kept(keep)
    if share is not None:
        positions = replace(positions, weight=torch.full(positions.index.shape, share, device=positions.index.device))
    return {**batch, "positions": {"distill": positions}, "signals": {"distill": batch["signals"]["distill"].kept(keep)}}

"""Evaluation by sums and counts over the whole set, so that the batch size does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from kdlib.trainers.meters import Sums
from kdlib.trainers.repeats import repeated
from kdlib.trainers.scoring import TeacherSignals
from kdlib.types import Loss, Positions

Batch = dict[str, Any]


class SummedEvaluation(Trainer):
    """A Trainer whose ``eval_loss`` and metrics are means over all scored rows, each counted once.

    Subclasses give the positions and the losses of a batch, and the weights of its terms.
    """

    teacher_signals: TeacherSignals
    _watching: bool
    _window: Sums
    _evaluated: Sums

    def positions(self, batch: Batch) -> dict[str, Positions]:
        raise NotImplementedError

    def term_weight(self, term: str) -> float:
        raise NotImplementedError

    def _losses(self, model: nn.Module, batch: Batch) -> Mapping[str, Loss]:
        raise NotImplementedError

    def evaluation_loop(self, *arguments: Any, metric_key_prefix: str = "eval", **options: Any) -> Any:
        """``eval_loss`` and the metrics as means over all scored rows, not over batches."""
        self._evaluated, self._watching, window = Sums(), True, self._window
        self._window = self._evaluated
        try:
            with torch.random.fork_rng(devices=[]):  # the data loader draws a seed, which would shift the run's dropout
                output = super().evaluation_loop(*arguments, metric_key_prefix=metric_key_prefix, **options)
        finally:
            self._window, self._watching = window, False
        means = self._evaluated.means(self.accelerator)
        terms = {name.removeprefix("loss/"): means.pop(name) for name in list(means) if name.startswith("loss/")}
        means["loss"] = sum(self.term_weight(name) * value for name, value in terms.items())
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        return output

    def prediction_step(
        self, model: nn.Module, inputs: Batch, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[None, None, None]:
        """Adds the batch's sums; nothing is returned, because the Trainer would average per-batch means."""
        inputs = self._unrepeated(self._prepare_inputs(inputs), size=self.args.eval_batch_size)
        batch = self.evaluation_batch(inputs)
        if self.teacher_signals.served:
            batch = self.teacher_signals.all_of([batch])[0]
        with torch.no_grad():
            losses = self._losses(model, batch)
        self._evaluated.add({f"loss/{name}": (loss.sum, loss.count) for name, loss in losses.items()})
        return None, None, None

    def evaluation_batch(self, batch: Batch) -> Batch:
        """A batch of evaluation rows with its ``positions``: of all rows, whatever ``prepare`` chooses in training."""
        return {**batch, "positions": self.positions(batch)}

    def _unrepeated(self, inputs: Batch, *, size: int) -> Batch:
        """Rows that accelerate repeats to give every rank a full last batch of ``size`` rows are not scored a second time."""
        loader, ranks = self.accelerator.gradient_state.active_dataloader, self.accelerator.num_processes
        if ranks == 1 or self.args.dataloader_drop_last or not loader.end_of_dataloader:
            return inputs
        # not loader.remainder, which a resumed epoch does not know
        remainder = loader.total_dataset_length % (size * ranks)
        if remainder == 0:
            return inputs
        if "rows" in inputs:
            first = max(0, remainder - self.accelerator.process_index * size)
            return {"rows": [row if i < first else repeated(row) for i, row in enumerate(inputs["rows"])]}
        labels = inputs["labels"].clone()
        labels[max(0, remainder - self.accelerator.process_index * size) :] = -100
        return {**inputs, "labels": labels}

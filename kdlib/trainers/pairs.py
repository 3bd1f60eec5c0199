"""Training on a right and a wrong answer to the same prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from kdlib.data import Prepared
from kdlib.data.pairs import PairCollator, load_pairs, prepare_pairs
from kdlib.data.positions import causal_positions
from kdlib.kernels import row_values
from kdlib.objectives import REDI, CrossEntropy
from kdlib.objectives.redi import NEGATIVE, POSITIVE, by_sign
from kdlib.trainers import setup
from kdlib.trainers.config import DistillationConfig
from kdlib.trainers.distillation import Batch, DistillationTrainer
from kdlib.trainers.step_rows import check_columns
from kdlib.types import Loss, Positions, StudentSignal, TeacherSignal


class PairedTrainer(DistillationTrainer):
    """A DistillationTrainer on pairs: loss = positive_weight * positive - alpha * negative, as ``REDI`` defines it.

    Both terms are divided by the pairs of the whole optimizer step, so that batches, accumulation, processes and padding do not
    matter. A batch of n rows is n pairs, both answers in the same micro-batch: 2n sequences.

    objective: REDI. train_dataset, eval_dataset: a directory of ``kdlib generate --verify``, or rows with ``prompt``,
    ``chosen`` and ``rejected``. args.max_pairs, args.unpaired: which pairs are made of a prompt's answers. No teacher.

    The log has ``rewards/chosen`` and ``rewards/rejected``, log q(y) / |y| in nats per token, a mean over pairs, and of pairs
    with both answers ``rewards/margins``, their difference, and ``rewards/accuracies``, the share where it is above 0.
    """

    objective: REDI
    pairs_rows = True

    def __init__(self, model: str | nn.Module, teacher: Any = None, *, objective: Any = None, **options: Any) -> None:
        super().__init__(model, teacher, objective=REDI() if objective is None else objective, **options)

    def prepared(
        self, rows: Any, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig, *, training: bool
    ) -> Prepared | None:
        """Pairs of token rows."""
        if rows is None or isinstance(rows, Prepared):
            return rows
        return self.prepared_pairs(rows, tokenizer, args, training=training)

    @staticmethod
    def prepared_pairs(rows: Any, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig, *, training: bool) -> Prepared:
        """The same without a trainer: of a path, a list or a Dataset."""
        found = load_pairs(rows) if isinstance(rows, str) else setup.opened(rows)
        columns = args.kept_columns if training else ()
        check_columns(found, columns)
        return prepare_pairs(
            found,
            tokenizer,
            max_pairs=args.max_pairs,
            unpaired=args.unpaired,
            columns=columns,
            **setup.preparation(args, training=training),
        )

    def collator(self, tokenizer: PreTrainedTokenizerBase, *, flatten: bool) -> Any:
        return PairCollator(tokenizer.pad_token_id)

    def positions(self, batch: Batch) -> dict[str, Positions]:
        """The scored tokens of right and of wrong answers."""
        return by_sign(causal_positions(batch))

    def term_weight(self, term: str) -> float:
        return self.objective.weight(term)

    def terms(self, model: nn.Module, batch: Batch, signals: Mapping[str, TeacherSignal | None]) -> dict[str, Loss]:
        """Both terms from one forward pass."""
        where = batch["positions"]
        index = torch.cat([where[name].index for name in (POSITIVE, NEGATIVE)])
        every = self.student_signal(model, batch, replace(where[POSITIVE], index=index))
        rows = dict(zip((POSITIVE, NEGATIVE), every.hidden.split([len(where[POSITIVE]), len(where[NEGATIVE])]), strict=True))
        students = {name: replace(every, hidden=rows[name], positions=where[name]) for name in rows}
        right = self.objective.term(students[POSITIVE], metrics=self._watching)
        if self._watching:
            right = replace(right, metrics={**right.metrics, **rewards(students[POSITIVE], students[NEGATIVE])})
        return {POSITIVE: right, NEGATIVE: self.objective.term(students[NEGATIVE])}

    def _unrepeated(self, inputs: Batch, *, size: int) -> Batch:
        """What accelerate repeats to fill a last batch are pairs: both lines of such a one are not scored a second time."""
        pair = inputs["sequence"][:, 0] // 2
        marks = super()._unrepeated({"labels": torch.zeros(int(pair.max()) + 1)}, size=size)["labels"]
        repeated = (marks == -100).to(pair.device)[pair]
        return {**inputs, "labels": inputs["labels"].masked_fill(repeated[:, None], -100)}


def rewards(positive: StudentSignal, negative: StudentSignal) -> dict[str, tuple[Tensor, int]]:
    """{name: (sum, count)} over pairs of log q(y) / |y| of both answers, their margins, and how often these are above 0."""
    pairs = torch.cat([positive.positions.sequence, negative.positions.sequence]) // 2
    if not len(pairs):
        return {}
    chosen, rejected = (_mean_logp(signal, int(pairs.max()) + 1) for signal in (positive, negative))
    margins = chosen - rejected
    found = {
        "chosen": chosen,
        "rejected": rejected,
        "margins": margins,
        "accuracies": (margins > 0).to(margins.dtype).where(~margins.isnan(), torch.nan),
    }
    known = {f"rewards/{name}": values[~values.isnan()] for name, values in found.items()}
    return {name: (values.sum(), len(values)) for name, values in known.items() if len(values)}


def _mean_logp(signal: StudentSignal, pairs: int) -> Tensor:
    """log q(y) / |y| of the answer in each pair, NaN for none [pairs]."""
    pair = signal.positions.sequence // 2
    logp = -row_values(signal, None, CrossEntropy())
    return logp.new_zeros(pairs).index_add(0, pair, logp) / torch.bincount(pair, minlength=pairs)

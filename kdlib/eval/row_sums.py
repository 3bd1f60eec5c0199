"""What models say about each row of a dataset: sums over its scored positions, for statistics over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kdlib.eval.acceptance_statistics import Sums
from kdlib.eval.scoring import ScoredChunk, scored_chunks
from kdlib.kernels.metrics import row_metrics
from kdlib.models import evaluating
from kdlib.types import DenseView

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def row_nats(model: Any, dataset: Dataset, *, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8) -> Sums:
    """-log p of each row's scored tokens in nats, over their number; ``dataset`` holds token rows."""

    def surprise(chunk: ScoredChunk) -> Tensor:
        return cross_entropy(chunk.logits[0], chunk.target, reduction="none")

    return _summed([model], dataset, surprise, vocab_size=len(tokenizer), batch_size=batch_size)


def row_divergences(
    student: Any, teacher: Any, dataset: Dataset, *, tokenizer: PreTrainedTokenizerBase, batch_size: int = 8
) -> Sums:
    """KL(p || q) of each row's scored positions in nats, teacher p, student q, over their number."""

    def divergence(chunk: ScoredChunk) -> Tensor:
        q, p = chunk.logits
        return row_metrics(DenseView(q), DenseView(p))["kl_forward"]

    return _summed([student, teacher], dataset, divergence, vocab_size=len(tokenizer), batch_size=batch_size)


@torch.no_grad()
def _summed(
    models: Sequence[Any], dataset: Dataset, value: Callable[[ScoredChunk], Tensor], *, vocab_size: int, batch_size: int
) -> Sums:
    sums, counts = np.zeros(len(dataset)), np.zeros(len(dataset))
    with evaluating(*models):
        for chunk in scored_chunks(models, dataset, vocab_size=vocab_size, batch_size=batch_size, desc="Scoring"):
            rows = chunk.row.numpy()
            np.add.at(sums, rows, value(chunk).double().cpu().numpy())
            np.add.at(counts, rows, 1.0)
    return Sums(of=sums, per=counts)

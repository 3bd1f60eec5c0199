"""How far a student is from its teacher on given rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from kdlib.eval.scoring import scored_chunks, token_rows
from kdlib.kernels.metrics import row_metrics
from kdlib.models import evaluating
from kdlib.types import DenseView

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def kl_to_teacher(
    student: Any,
    teacher: Any,
    rows: Dataset | Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Means over the scored positions of ``rows``: nats per token at temperature 1, teacher p, student q.

    ``kl_forward`` = KL(p || q), ``kl_reverse`` = KL(q || p), ``entropy_teacher``, ``entropy_student``,
    ``top1_agreement`` (share of positions where both prefer the same token), ``acceptance`` = sum min(p, q) and
    ``acceptance_greedy`` = p(argmax q) on these rows, and ``tokens`` (their number).
    Both models use ``tokenizer``; their vocabularies are cut to its length before the softmax.

    Raises ValueError when a vocabulary is smaller than the other's or nothing is scored. Training modes are
    restored.
    """
    vocab = [min(model.get_output_embeddings().weight.shape[0], len(tokenizer)) for model in (student, teacher)]
    if vocab[0] != vocab[1]:
        raise ValueError(
            f"student and teacher know {vocab[0]} and {vocab[1]} of the tokenizer's entries: give models of one tokenizer"
        )
    prepared = token_rows(
        rows,
        tokenizer=tokenizer,
        model=student,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
    )
    sums: dict[str, float] = defaultdict(float)
    tokens = 0
    with evaluating(student, teacher):
        chunks = scored_chunks(
            [student, teacher],
            prepared.dataset,
            vocab_size=len(tokenizer),
            batch_size=batch_size,
            desc="Divergence",
        )
        for chunk in chunks:
            q, p = chunk.logits
            for name, values in row_metrics(DenseView(q), DenseView(p)).items():
                sums[name] += float(values.double().sum())
            tokens += len(chunk.row)
    if tokens == 0:
        raise ValueError("no token is scored: give rows with a completion, an assistant turn or a text")
    return {name: total / tokens for name, total in sums.items()} | {"tokens": tokens}

"""Bits per byte: how well a model predicts a text, comparable between tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from kdlib.eval.results import interval
from kdlib.eval.scoring import scored_chunks, token_rows
from kdlib.models import evaluating

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class BitsPerByte:
    """sum of nats / (ln 2 * sum of bytes) over the scored text.

    ``stderr`` is that of a ratio estimator over rows, sqrt(n / (n - 1) * sum_i (bits_i - R bytes_i)^2) /
    sum_i bytes_i, and ``low``, ``high`` lie 1.96 of it away; None for a single row. ``tokens`` counts the
    predicted tokens, end-of-turn included; ``bytes`` the UTF-8 bytes of the predicted text without special
    tokens; ``truncated`` the rows cut at max_length.
    """

    bits_per_byte: float
    stderr: float | None
    low: float | None
    high: float | None
    nats_per_token: float
    tokens: int
    bytes: int
    rows: int
    truncated: int

    def as_results(self, *, task: str = "text") -> dict[str, Any]:
        """The score in the shape of lm-eval's results, for tables, files and reports."""
        scores = {
            "alias": task,
            "bits_per_byte,none": self.bits_per_byte,
            "bits_per_byte_stderr,none": self.stderr,
        }
        return {
            "results": {task: scores},
            "n-samples": {task: {"original": self.rows, "effective": self.rows}},
            "higher_is_better": {task: {"bits_per_byte": False}},
        }


@torch.no_grad()
def bits_per_byte(
    model: Any,
    rows: Dataset | Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int = 8,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> BitsPerByte:
    """Bits per UTF-8 byte of the scored part of ``rows``, which are of any kind that training takes.

    Scored is all of ``text``, the ``completion``, every assistant turn of ``messages``, or what ``labels``
    say. The nats of special tokens that end a text or turn count, as the model has to predict the end; their
    bytes do not, as they are not in the text. The first token of a row is never predicted: without a
    beginning-of-sequence token its bytes are left out as well, which depends a little on the tokenizer (as
    does a token that straddles prompt and completion: it is scored). The softmax runs over the tokenizer's
    entries, not over padding entries.

    Raises ValueError when nothing is scored. ``model`` is a transformers or peft model; its training mode is
    restored.
    """
    prepared = token_rows(
        rows,
        tokenizer=tokenizer,
        model=model,
        max_length=max_length,
        chat_template_kwargs=chat_template_kwargs,
    )
    dataset = prepared.dataset
    nats, tokens = torch.zeros(len(dataset), dtype=torch.float64), 0
    with evaluating(model):
        for chunk in scored_chunks([model], dataset, vocab_size=len(tokenizer), batch_size=batch_size, desc="Bits per byte"):
            surprise = cross_entropy(chunk.logits[0], chunk.target, reduction="none")
            nats.index_add_(0, chunk.row, surprise.double().cpu())
            tokens += len(chunk.row)
    counts = [scored_bytes(row["input_ids"], row["labels"], tokenizer=tokenizer) for row in dataset]
    if tokens == 0 or sum(counts) == 0:
        raise ValueError("no text is scored: give rows whose completion or text has more than special tokens")
    return BitsPerByte(**per_byte(nats, counts, tokens=tokens), truncated=prepared.truncated)


def per_byte(nats: torch.Tensor, counts: Sequence[int], *, tokens: int) -> dict[str, Any]:
    """The fields of BitsPerByte that follow from ``nats`` [rows] float64, ``counts`` of bytes and the number of tokens."""
    value, stderr = _ratio(nats / math.log(2), torch.tensor(counts, dtype=torch.float64))
    low, high = interval(value, stderr)
    return {
        "bits_per_byte": value,
        "stderr": stderr,
        "low": low,
        "high": high,
        "nats_per_token": float(nats.sum()) / tokens,
        "tokens": tokens,
        "bytes": sum(counts),
        "rows": len(counts),
    }


def scored_bytes(input_ids: Sequence[int], labels: Sequence[int], *, tokenizer: PreTrainedTokenizerBase) -> int:
    """UTF-8 bytes of the predicted text of one row, special tokens left out.

    Each scored stretch counts as the text with it minus the text before it, because many tokenizers drop the
    space in front of a text that is decoded on its own.
    """

    def length(end: int) -> int:
        ids = list(input_ids[:end])
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return len(str(text).encode())

    return sum(length(stop) - length(start) for start, stop in _stretches(labels))


def _stretches(labels: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[start, stop) of consecutive scored positions; position 0 is never predicted."""
    start = None
    for position in range(1, len(labels) + 1):
        scored = position < len(labels) and labels[position] != -100
        if scored and start is None:
            start = position
        if not scored and start is not None:
            yield start, position
            start = None


def _ratio(bits: torch.Tensor, counts: torch.Tensor) -> tuple[float, float | None]:
    """sum(bits) / sum(bytes) and the linearised standard error of that ratio over rows."""
    n, total = len(bits), counts.sum()
    ratio = bits.sum() / total
    if n < 2:
        return float(ratio), None
    residual = (bits - ratio * counts).square().sum()
    return float(ratio), float((residual * n / (n - 1)).sqrt() / total)

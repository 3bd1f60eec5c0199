"""Bits per byte of a masked diffusion language model: a bound, estimated by drawing masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kdlib.data.draft import UNSCORED
from kdlib.diffusion import DiffusionSpec, check_diffusion, spec_of
from kdlib.eval.bpb import BitsPerByte, per_byte, scored_bytes
from kdlib.eval.diffusion_likelihood import Text, log_likelihoods
from kdlib.eval.scoring import token_rows
from kdlib.models import check_head, evaluating, inner

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class DiffusionBound(BitsPerByte):
    """Bits per byte and nats per token that the model needs at most, estimated by ``mc_samples`` masks a row.

    The bound is that of ``kdlib.eval.diffusion_likelihood`` and given the row's length, as all its tokens' places are known.
    ``stderr`` over rows has the noise of the masks in it.
    """

    mc_samples: int

    def as_results(self, *, task: str = "text") -> dict[str, Any]:
        """As BitsPerByte, with the score named ``bits_per_byte_bound``."""
        scores = {
            "alias": task,
            "bits_per_byte_bound,none": self.bits_per_byte,
            "bits_per_byte_bound_stderr,none": self.stderr,
        }
        return {
            **super().as_results(task=task),
            "results": {task: scores},
            "higher_is_better": {task: {"bits_per_byte_bound": False}},
        }


@torch.no_grad()
def diffusion_bound(
    model: Any,
    rows: Dataset | Sequence[Mapping[str, Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    spec: DiffusionSpec | None = None,
    mc_samples: int = 32,
    batch_size: int = 8,
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> DiffusionBound:
    """The bound for the scored part of ``rows``, of any kind that training takes; the same part as ``bits_per_byte`` scores.

    All scored tokens of a row are masked or not by chance, its others are always seen; with block-causal attention block by
    block. No end padding is added. ``spec``: None for the one in the model's configuration. The softmax runs over the
    tokenizer's entries. ``model`` is a transformers or peft model; its training mode is restored.

    Raises ValueError when nothing is scored, and for a model that is no masked diffusion model.
    """
    spec = spec_of(inner(model).config) if spec is None else spec
    check_diffusion(model, spec)
    check_head(model, role="model")
    prepared = token_rows(
        rows, tokenizer=tokenizer, model=model, max_length=max_length, chat_template_kwargs=chat_template_kwargs
    )
    dataset = prepared.dataset
    texts = [Text(ids=row["input_ids"], scored=_scored(row["labels"])) for row in dataset]
    counts = [scored_bytes(row["input_ids"], row["labels"], tokenizer=tokenizer) for row in dataset]
    if not texts or sum(counts) == 0:
        raise ValueError("no text is scored: give rows whose completion or text has more than special tokens")
    with evaluating(model):
        found = log_likelihoods(
            model,
            texts,
            spec=spec,
            vocab_size=len(tokenizer),
            samples=mc_samples,
            batch_size=batch_size,
            seed=seed,
            desc="Bound on bits per byte",
        )
    tokens = sum(len(text.scored) for text in texts)
    return DiffusionBound(**per_byte(-found, counts, tokens=tokens), truncated=prepared.truncated, mc_samples=mc_samples)


def _scored(labels: Sequence[int]) -> list[int]:
    return [i for i, label in enumerate(labels) if label != UNSCORED and i > 0]

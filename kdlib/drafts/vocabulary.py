"""The draft's vocabulary: the target's tokens that a draft head can propose, and the two maps that checkpoints carry.

``d2t`` int64 [DV] holds OFFSETS: target id = draft id + d2t[draft id]. ``t2d`` bool [V] marks the target ids that are in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kdlib.head import Head


@dataclass(frozen=True, kw_only=True)
class DraftVocabulary:
    """``ids`` int64 [DV], the target ids of the draft's entries in rising order; ``vocab_size`` V of the target.

    ``covered``: share of the counted tokens that are in it, None where nothing was counted.
    """

    ids: Tensor
    vocab_size: int
    covered: float | None = None

    @property
    def d2t(self) -> Tensor:
        """Offsets int64 [DV]."""
        return self.ids - torch.arange(len(self.ids), device=self.ids.device)

    @property
    def t2d(self) -> Tensor:
        """Membership bool [V]."""
        return torch.zeros(self.vocab_size, dtype=torch.bool, device=self.ids.device).index_fill(0, self.ids, True)

    @property
    def draft_ids(self) -> Tensor:
        """int64 [V]: the draft id of each target id, -1 outside."""
        found = torch.full((self.vocab_size,), -1, device=self.ids.device)
        return found.index_copy(0, self.ids, torch.arange(len(self.ids), device=self.ids.device))

    @staticmethod
    def whole(vocab_size: int) -> DraftVocabulary:
        """Every entry of the target."""
        return DraftVocabulary(ids=torch.arange(vocab_size), vocab_size=vocab_size, covered=1.0)

    @staticmethod
    def of_maps(d2t: Tensor, t2d: Tensor | None, *, vocab_size: int) -> DraftVocabulary:
        """From a checkpoint's tensors; ValueError where they contradict each other or are not offsets of rising ids."""
        ids = d2t.long() + torch.arange(len(d2t), device=d2t.device)
        if len(ids) == 0 or int(ids.min()) < 0 or int(ids.max()) >= vocab_size or bool((ids.diff() <= 0).any()):
            raise ValueError(
                f"d2t does not hold offsets (target id - draft id) of rising ids below {vocab_size}: "
                "was it written with target ids, or for another target?"
            )
        found = DraftVocabulary(ids=ids, vocab_size=vocab_size)
        if t2d is not None and (t2d.shape != (vocab_size,) or not torch.equal(t2d.bool(), found.t2d)):
            raise ValueError(
                "t2d and d2t name different tokens: the checkpoint is damaged, or its two maps are of different heads"
            )
        return found


def draft_vocabulary(counts: Tensor, size: int, *, vocab_size: int) -> DraftVocabulary:
    """The ``size`` most frequent of ``vocab_size`` target ids by ``counts`` [<= V], in rising order.

    Ties go to the lower id, and so do places left over when fewer ids occur than there is room for. ``size`` V is the identity.
    """
    if not 1 <= size <= vocab_size:
        raise ValueError(f"draft_vocab_size must be between 1 and the target's {vocab_size}, not {size}")
    if len(counts) > vocab_size:
        raise ValueError(f"tokens are counted up to id {len(counts) - 1}, the target has {vocab_size}")
    padded = torch.zeros(vocab_size, dtype=torch.long)
    padded[: len(counts)] = counts.cpu()
    ids = padded.argsort(descending=True, stable=True)[:size].sort().values
    total = int(padded.sum())
    return DraftVocabulary(ids=ids, vocab_size=vocab_size, covered=int(padded[ids].sum()) / total if total else None)


def restricted(head: Head, ids: Tensor) -> Head:
    """The target's head with the rows ``ids`` [DV] alone: its softmax is p renormalised on the draft's vocabulary."""
    lora = None if head.lora is None else (head.lora[0], head.lora[1][ids], head.lora[2])
    return replace(head, weight=head.weight[ids], bias=None if head.bias is None else head.bias[ids], lora=lora)

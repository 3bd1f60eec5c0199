"""Which positions the steps of a training-time test score, and what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.data.draft import UNSCORED
from kdlib.drafts.vocabulary import DraftVocabulary, restricted
from kdlib.head import Head
from kdlib.kernels.chunked import chunk_rows
from kdlib.types import Positions, TeacherSignal


def step_positions(batch: Mapping[str, Tensor], steps: int) -> dict[str, Positions]:
    """{"step_j": positions t whose token x_{t+2+j} is scored}; ``teacher_index`` is t + 1 + j, the target's prediction.

    Both count in the flattened [B * S]. The rows of a later step are among those of step 0, in the same order.
    """
    labels, sequence = batch["labels"], batch["sequence"]
    S = labels.shape[1]
    line, token = (labels != UNSCORED).nonzero(as_tuple=True)
    found = {}
    for j in range(steps):
        kept = token >= 2 + j
        rows, s = line[kept], token[kept]
        found[f"step_{j}"] = Positions(
            index=rows * S + s - 2 - j, labels=labels[rows, s], sequence=sequence[rows, s], teacher_index=rows * S + s - 1
        )
    return found


@dataclass(frozen=True, kw_only=True)
class TargetRows:
    """What the target says at the rows of step 0, N in number.

    ``signal``: hidden states and whole head; ``head``: the same on the draft's vocabulary, whose softmax is p renormalised
    there; ``index`` [N]: where they are; ``best`` [N]: the likeliest token (None with a whole vocabulary, on steps that are not
    logged); ``inside`` [N]: whether that is in the draft's vocabulary (None with a whole one); ``normaliser`` [N]: log sum exp
    over all of V, on logged steps.
    """

    signal: TeacherSignal
    head: Head
    index: Tensor
    best: Tensor | None
    inside: Tensor | None
    normaliser: Tensor | None

    @staticmethod
    @torch.no_grad()
    def of(signal: TeacherSignal, index: Tensor, *, vocabulary: DraftVocabulary, watching: bool) -> TargetRows:
        """``index`` [N]: the rows' teacher_index; ``vocabulary`` is cut to the head's entries."""
        assert signal.head is not None and signal.hidden is not None
        whole = len(vocabulary.ids) == signal.head.out_features
        best: Tensor | None = None
        normaliser: Tensor | None = None
        if watching or not whole:
            found = [(z.argmax(-1), z.logsumexp(-1)) for z in _logits(signal.hidden, signal.head)]
            best, normaliser = (
                (torch.cat([*x, index.new_zeros(0)]) for x in zip(*found, strict=True)) if found else (index, None)
            )
        return TargetRows(
            signal=signal,
            head=signal.head if whole else restricted(signal.head, vocabulary.ids),
            index=index,
            best=best,
            inside=None if whole or best is None else vocabulary.t2d[best],
            normaliser=normaliser if watching else None,
        )

    def at(self, positions: Positions) -> Tensor:
        """Which of the N rows these positions' are."""
        assert positions.teacher_index is not None
        return torch.searchsorted(self.index, positions.teacher_index)


@torch.no_grad()
def step_metrics(
    step: int, hidden: Tensor, *, head: Head, target: TargetRows, rows: Tensor, ids: Tensor
) -> dict[str, tuple[Tensor, int]]:
    """``acceptance/step_j``: sum_v min(p_v, q_v) over ALL of V, p not renormalised; ``accuracy/step_j``: argmax p = argmax q.

    A token outside of the draft's vocabulary counts as not accepted and as wrong; ``outside_draft_vocabulary``: how often the
    target's likeliest is.
    """
    assert target.normaliser is not None and target.best is not None and target.signal.hidden is not None
    of_target, normaliser, best = target.signal.hidden[rows], target.normaliser[rows], target.best[rows]
    accepted, right = hidden.new_zeros((), dtype=torch.float64), hidden.new_zeros((), dtype=torch.float64)
    start = 0
    for q, p in zip(_logits(hidden, head), _logits(of_target, target.head, size=chunk_rows(hidden, head)), strict=True):
        chunk = slice(start, start := start + len(q))
        shared = torch.minimum(q.log_softmax(-1), p - normaliser[chunk, None])
        accepted += shared.exp().sum(dtype=torch.float64)
        right += (ids[q.argmax(-1)] == best[chunk]).sum()
    found = {f"acceptance/step_{step}": (accepted, len(rows)), f"accuracy/step_{step}": (right, len(rows))}
    if step == 0 and target.inside is not None:
        found["outside_draft_vocabulary"] = ((~target.inside[rows]).sum().double(), len(rows))
    return found


def _logits(hidden: Tensor, head: Head, *, size: int | None = None) -> Iterator[Tensor]:
    """The logits of some rows at a time."""
    return (head(part) for part in hidden.split(size or chunk_rows(hidden, head))) if len(hidden) else iter(())

"""Which positions of a causal language model are scored: the one place where data and labels are shifted."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from kdlib.data.draft import UNSCORED
from kdlib.types import Positions


def causal_positions(batch: Mapping[str, Tensor]) -> Positions:
    """Positions t whose next token is scored: labels[t + 1] != -100, row by row, left to right.

    ``batch`` holds ``labels`` and ``sequence`` [B, S], unshifted, with -100 at every sample's first token (so
    that no position predicts the next sample of a packed row). ``index`` [N] counts in the flattened [B * S];
    ``labels`` and ``sequence`` [N] are those of the predicted token; all on the device of the batch.
    """
    labels, sequence = batch["labels"], batch["sequence"]
    line, position = (labels[:, 1:] != UNSCORED).nonzero(as_tuple=True)
    return Positions(
        index=line * labels.shape[1] + position,
        labels=labels[line, position + 1],
        sequence=sequence[line, position + 1],
    )

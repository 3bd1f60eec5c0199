"""What an engine gave for a row, as a Completion: one bad row is reported, and does not end the run."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

from kdlib.serving.scoring import BadRow, Row, Scorer
from kdlib.types import Completion

_logger = logging.getLogger("kdlib.samplers")


def completion(ids: Sequence[int], logp: Sequence[float | None], *, stop_ids: Sequence[int], row: int) -> Completion:
    """The completion of prompt ``row``; without tokens, and with a warning, where the engine's numbers cannot be used."""
    if not ids:
        return unusable(row, "the engine generated nothing")
    known = [value for value in logp if value is not None and math.isfinite(value)]
    if len(known) != len(ids):
        return unusable(row, f"{len(ids) - len(known)} of {len(ids)} log-probs are missing, NaN or infinite")
    return Completion(ids=list(ids), logp=known, finish="stop" if ids[-1] in stop_ids else "length")


def unusable(row: int, reason: str) -> Completion:
    """A completion without tokens, which says that prompt ``row`` has to be skipped."""
    _logger.warning("rollout of prompt %d is skipped: %s", row, reason)
    return Completion(ids=[], logp=[], finish="length")


def own_log_probs(scorer: Scorer, sequences: Sequence[list[int]]) -> list[list[float]]:
    """log q(x_t | x_<t) at temperature 1 of each sequence's own tokens; ValueError for one that the engine cannot score."""
    rows = [Row(tokens=sequence, wanted=list(range(len(sequence) - 1))) for sequence in sequences]
    found = []
    for number, answer in enumerate(scorer.logprobs(rows, k=1, temperature=1.0)):
        if isinstance(answer, BadRow):
            raise ValueError(f"the rollout engine cannot score sequence {number}: {answer.reason}")
        found.append(answer.own()[0][:, 0].tolist())
    return found

"""Tokens, passes and seconds of the answers that a diffusion language model has decoded so far."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from kdlib.decoding.diffusion import DiffusionOutput

ANNOUNCED_AFTER = 3  # batches


@dataclass(kw_only=True)
class Counts:
    """``tokens`` before the end token and ``forwards`` of each answer, in the order of decoding; ``guide_forwards``: passes of
    a guiding model, beside these, over all answers; ``seconds`` of all ``batches``.
    """

    tokens: list[int] = field(default_factory=list)
    forwards: list[int] = field(default_factory=list)
    guide_forwards: int = 0
    seconds: float = 0.0
    batches: int = 0

    def add(self, output: DiffusionOutput) -> None:
        """The answers of a batch."""
        self.tokens += output.lengths.tolist()
        self.forwards += output.forwards.tolist()
        self.guide_forwards += int(output.guide_forwards.sum())

    def took(self, seconds: float, *, expected: int) -> None:
        """Adds a batch's time, and says once how long the ``expected`` answers will take."""
        self.seconds += seconds
        self.batches += 1
        done = len(self.tokens)
        if self.batches == ANNOUNCED_AFTER and done < expected:
            whole = self.seconds / done * expected
            tqdm.write(
                f"{done} of {expected} answers in {_time(self.seconds)}: about {_time(whole)} for all of them", file=sys.stderr
            )

    def to_json(self) -> dict[str, Any]:
        """Sums; tokens_per_forward is None when nothing was decoded."""
        tokens, forwards = sum(self.tokens), sum(self.forwards)
        return {
            "answers": len(self.tokens),
            "tokens": tokens,
            "forwards": forwards,
            "guide_forwards": self.guide_forwards,
            "tokens_per_forward": tokens / forwards if forwards else None,
            "seconds": self.seconds,
        }


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"

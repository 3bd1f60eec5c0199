"""Users' own objectives, given to the commands as a file: they end their own run when they are told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from kdlib.objectives import TAID, StepHalving


def interrupt(step: int) -> None:
    """Sends this process $INTERRUPT_SIGNAL at the end of step $INTERRUPT_STEP, before that is logged."""
    if step == int(os.environ.get("INTERRUPT_STEP", "0")) and os.environ.get("RANK", "0") == "0":
        os.kill(os.getpid(), signal.Signals[os.environ["INTERRUPT_SIGNAL"]])


@dataclass(frozen=True, kw_only=True)
class InterruptedTAID(TAID):
    """TAID that may be interrupted."""

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> dict[str, float]:
        interrupt(step)
        return super().update(state, global_loss, step)


@dataclass(frozen=True, kw_only=True)
class InterruptedHalving(StepHalving):
    """StepHalving that may be interrupted."""

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> dict[str, float]:
        interrupt(step)
        return super().update(state, global_loss, step)

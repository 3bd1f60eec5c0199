"""A user's own objective, given to the command as a file: TAID that ends its own run when it is told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from kdlib.objectives import TAID


@dataclass(frozen=True, kw_only=True)
class InterruptedTAID(TAID):
    """Sends its process $INTERRUPT_SIGNAL at the end of step $INTERRUPT_STEP, before that is logged."""

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> dict[str, float]:
        if step == int(os.environ.get("INTERRUPT_STEP", "0")) and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.Signals[os.environ["INTERRUPT_SIGNAL"]])
        return super().update(state, global_loss, step)

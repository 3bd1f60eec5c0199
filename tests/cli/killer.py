"""A verifier and objectives that end the run they are in, once, when the test has asked for that stage.

The directory KDLIB_TEST_KILLS holds a file for each stage to be ended, named like it; what is in it is the signal's number.
SIGKILL takes the whole run with it, as a machine that goes away does; other signals are sent to ``kdlib run`` alone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor

from kdlib.objectives import CrossEntropy, ForwardKL
from kdlib.types import View

CALL = 12  # the call in which a verifier ends its stage: in the second batch
CHECKPOINT = "checkpoint-2/kdlib_state.json"  # the file that a training has written when it is ended
calls = 0


def ended(*, training: bool) -> None:
    """Ends the run when its time has come."""
    global calls
    calls += 1
    if "KDLIB_TEST_KILLS" not in os.environ or "--config" not in sys.argv:
        return
    config = Path(sys.argv[sys.argv.index("--config") + 1])
    asked = Path(os.environ["KDLIB_TEST_KILLS"]) / config.stem
    ready = (config.with_suffix("") / CHECKPOINT).is_file() if training else calls == CALL
    if ready and asked.is_file():
        number = int(asked.read_text())
        asked.unlink()
        run = json.loads((config.parent / "run.lock").read_text())["run"]
        if number == signal.SIGKILL:
            os.kill(run, number)
            os.killpg(os.getpgid(0), number)
        _sent_on(run, number)


def _sent_on(run: int, number: int) -> None:
    """Sends ``kdlib run`` a signal and waits until it has come back here: this training is faster than the way round."""
    arrived, before = list[int](), signal.getsignal(number)
    assert callable(before)

    def note(received: int, frame: FrameType | None) -> None:
        arrived.append(received)
        before(received, frame)

    signal.signal(number, note)
    os.kill(run, number)
    while not arrived:
        time.sleep(0.05)
    signal.signal(number, before)


def right(completion: str, row: Mapping[str, Any]) -> bool:
    """About every second completion, whatever is asked: models of tests know nothing."""
    ended(training=False)
    return len(completion) % 2 == 0


def never(completion: str, row: Mapping[str, Any]) -> bool:
    return False


@dataclass(frozen=True, kw_only=True)
class Taught(CrossEntropy):
    """CrossEntropy that ends the run when it is asked to."""

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        ended(training=True)
        return super().row(q, p, labels)


@dataclass(frozen=True, kw_only=True)
class Judged(ForwardKL):
    """ForwardKL that ends the run when it is asked to."""

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        ended(training=True)
        return super().row(q, p, labels)

"""Commands that may be stopped at any time, because every write of theirs is safe against being cut."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console


class Stopped(KeyboardInterrupt):
    """A SIGINT or SIGTERM; what is on disk is complete as far as the command had come."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def run_stoppable(work: Callable[[], int]) -> int:
    """The exit code of ``work``; 128 + the signal's number when SIGINT or SIGTERM stopped it, and a line that says so."""
    with _stoppable():
        try:
            return work()
        except Stopped as stop:
            Console(stderr=True, soft_wrap=True, highlight=False).print("stopped; the same command continues", markup=False)
            return 128 + stop.number


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT and SIGTERM raise Stopped wherever the run is."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

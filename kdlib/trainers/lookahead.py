"""Rollouts and teacher scoring of the next steps while this one's update runs."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

Raw = TypeVar("Raw")
Made = TypeVar("Made")


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Seconds the update waited for rollouts, and the rollouts for an update."""

    update: float
    rollout: float


class Lookahead(Generic[Raw, Made]):
    """One worker thread that makes steps in order, up to ``depth`` ahead of the one asked for.

    make(raw, step) makes a step from its raw batches. What it takes from the training thread when a step is queued, such as
    weights, is then at most ``depth`` optimizer steps old.
    """

    def __init__(self, make: Callable[[Raw, int], Made], *, depth: int) -> None:
        self._make, self._depth = make, depth
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollouts")
        self._queue: deque[Future[Made]] = deque()
        self._idle_since, self._idle = time.perf_counter(), 0.0

    def next(self, pull: Callable[[], Raw | None], *, step: int) -> tuple[Made, Waits]:
        """What was made for ``step``, after queueing those behind it; ``pull`` gives raw batches, None at an epoch's end."""
        while len(self._queue) <= self._depth:
            raw = pull()
            if raw is None:
                break
            self._queue.append(self._worker.submit(self._timed, raw, step + len(self._queue)))
        start, idle = time.perf_counter(), self._idle
        self._idle = 0.0
        made = self._queue.popleft().result()
        return made, Waits(update=time.perf_counter() - start, rollout=idle)

    def _timed(self, raw: Raw, step: int) -> Made:
        self._idle += time.perf_counter() - self._idle_since
        try:
            return self._make(raw, step)
        finally:
            self._idle_since = time.perf_counter()

    def clear(self) -> None:
        """Forgets what was queued and waits for what is being made."""
        while self._queue:
            future = self._queue.popleft()
            if not future.cancel():
                future.exception()

    def close(self) -> None:
        self.clear()
        self._worker.shutdown()

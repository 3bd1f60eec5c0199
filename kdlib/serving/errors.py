"""What can go wrong between a run and the servers it asks."""

from __future__ import annotations

from kdlib.types import TeacherSignal, Tensor


class ServerAwayError(ConnectionError):
    """No answer for ``patience`` seconds: the run stops with a checkpoint."""


class ServerRefusedError(ValueError):
    """The server understood the request and declined it (HTTP 4xx); the message is the server's, in one line.

    ``status`` is the HTTP status.
    """

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class ServerFailedError(ServerRefusedError):
    """A healthy server fails on this one request: HTTP 500 several times, or an answer that holds NaN."""


class BadRowsError(ValueError):
    """The teacher's answer is unusable for some rows of a batch; the others are in ``signal``.

    ``keep`` [N] (bool, CPU) marks the positions that ``signal`` holds (None when none is left), ``samples`` names the rest's
    sample ids, ``reason`` says what is wrong with the first of them.
    """

    def __init__(self, *, keep: Tensor, signal: TeacherSignal | None, samples: list[int], reason: str) -> None:
        named = ", ".join(str(sample) for sample in samples)
        super().__init__(f"the teacher's answer is unusable for sample {named}: {reason}; leave it out of the dataset")
        self.keep, self.signal, self.samples, self.reason = keep, signal, samples, reason

"""A stage in a process of its own: what it says is kept and shown, and signals reach it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

POLL_SECONDS = 0.1


def run_logged(
    words: Sequence[str], *, log: Path, descriptors: Sequence[int], started: Callable[[int], None]
) -> tuple[int, int | None]:
    """(exit code of ``kdlib WORDS``, the last signal that this process got meanwhile).

    Its output is added to ``log``, and from there shown: a process whose parent is killed goes on undisturbed. It keeps
    ``descriptors`` open, and ``started`` is told its number. SIGINT and SIGTERM are sent on to it, and it is waited for. A
    process ended by signal n has exit code 128 + n, as in a shell.
    """
    received: list[int] = []
    with log.open("ab") as written, log.open("rb") as shown, _noted(received):
        shown.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, "-m", "kdlib", *words],
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": str(shutil.get_terminal_size((120, 24)).columns)},
            process_group=0,  # a terminal's Ctrl-C reaches it once, from here
            pass_fds=descriptors,
        )
        started(process.pid)
        sent = 0
        while process.poll() is None:
            for number in received[sent:]:
                process.send_signal(number)
                sent += 1
            _show(shown)
            time.sleep(POLL_SECONDS)
        _show(shown)
    code = process.returncode
    return (code if code >= 0 else 128 - code), (received[-1] if received else None)


def _show(shown: BinaryIO) -> None:
    """What was written to the log since the last time."""
    if content := shown.read():
        sys.stdout.flush()
        sys.stdout.buffer.write(content)
        sys.stdout.buffer.flush()


@contextmanager
def _noted(received: list[int]) -> Iterator[None]:
    """SIGINT and SIGTERM are noted instead of ending this process."""

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Work in a process of its own: an engine gives its memory back only with its process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from kdlib.cli.main import NOT_A_DEFECT

T = TypeVar("T")


def in_own_process(work: Callable[..., T], *arguments: Any, what: str) -> T:
    """What ``work`` returns; a user's mistake there is raised here.

    ChildProcessError, naming ``what``, when a signal ends the process, RuntimeError after a defect, whose traceback it prints.
    It ends with this process, however this one ends.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, work, arguments))
    child.start()
    theirs.close()
    try:
        outcome = ours.recv()
        child.join()
    except EOFError:
        child.join()
        assert child.exitcode is not None
        kind = ChildProcessError if child.exitcode < 0 else RuntimeError
        raise kind(f"the process that scored {what} ended with code {child.exitcode}: see above") from None
    finally:
        if child.is_alive():
            child.terminate()
            child.join()
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _child(pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        outcome = work(*arguments)
    except NOT_A_DEFECT as error:
        outcome = ValueError(str(error))
    pipe.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)

"""lm-eval without its log: errors, the first truncation, and the progress bars remain."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial


class _FirstTruncation(logging.Filter):
    """Lets errors through, and once that prompts were truncated, because that changes what a score means."""

    def __init__(self) -> None:
        super().__init__()
        self.told = False

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            return True
        if self.told or "truncat" not in record.getMessage().lower():
            return False
        self.told = True
        return True


@contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """lm-eval's loggers and its call of git are put back afterwards."""
    from lm_eval import evaluator
    from lm_eval.loggers.utils import get_commit_from_path

    everything, models = logging.getLogger("lm_eval"), logging.getLogger("lm_eval.models.huggingface")
    levels, ask_git = (everything.level, models.level), evaluator.get_git_commit_hash
    only_truncation = _FirstTruncation()
    everything.setLevel(logging.ERROR)
    models.setLevel(logging.WARNING)
    models.addFilter(only_truncation)
    # lm-eval runs git, which prints "fatal" outside a repository; this reads the same hash from the files
    evaluator.get_git_commit_hash = partial(get_commit_from_path, os.getcwd())
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = ask_git
        models.removeFilter(only_truncation)
        everything.setLevel(levels[0])
        models.setLevel(levels[1])

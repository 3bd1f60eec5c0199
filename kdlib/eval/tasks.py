"""Which lm-eval tasks a user means: names, globs, YAML files, with or without lm-eval's own collection."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def find_tasks(
    tasks: Sequence[str], *, include_path: str | os.PathLike[str] | Sequence[str] | None = None
) -> tuple[TaskManager, list[str]]:
    """The task manager and the names that ``tasks`` stand for.

    lm-eval's own tasks (a scan of thousands of files) are only read when ``include_path`` does not have all
    that is asked for. Raises ValueError with the nearest names for an unknown task, and for a missing
    ``include_path``.
    """
    from lm_eval.tasks import TaskManager

    paths = [include_path] if isinstance(include_path, str | os.PathLike) else list(include_path or ())
    missing = [str(path) for path in paths if not Path(path).is_dir()]
    if missing:
        raise ValueError(f"include_path {missing[0]!r} is not a directory: give the one with the task's YAML")
    if not tasks:
        raise ValueError("no task is named: give tasks, such as gsm8k, or the path of a task's YAML file")
    manager = TaskManager(include_path=paths, include_defaults=False)
    found = [_match(manager, task) for task in tasks]
    if not all(found):
        manager = TaskManager(include_path=paths)
        found = [_match(manager, task) for task in tasks]
    for task, names in zip(tasks, found, strict=True):
        if not names:
            near = difflib.get_close_matches(task, manager.all_tasks, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else "for a task of your own give include_path"
            raise ValueError(f"unknown task {task!r}: {hint}")
    return manager, list(dict.fromkeys(name for names in found for name in names))


def _match(manager: TaskManager, task: str) -> list[str]:
    """Names that match a name or glob; a YAML file stands for itself."""
    if task.endswith((".yaml", ".yml")) and Path(task).is_file():
        return [task]
    return manager.match_tasks([task])

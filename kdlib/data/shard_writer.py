"""Writing a directory of shards: begun or continued, and by one process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from kdlib.data.shards import INDEX_FILE, ShardIndex, ShardT, written_files

IndexT = TypeVar("IndexT", bound=ShardIndex[Any])


class ShardWriter(Generic[IndexT]):
    """A directory that is one process's to write in until ``close``.

    One of the same ``settings`` is continued: ``missing`` names the shards still to write, ``damaged`` what is wrong with those
    among them whose file was there. Raises ValueError naming the changed settings otherwise, for a directory of something else,
    and while another process writes there.
    """

    index_class: type[IndexT]

    def __init__(
        self,
        directory: str | Path,
        settings: Mapping[str, Any],
        *,
        prompts: int,
        rows_per_shard: int,
        overwrite: bool = False,
    ) -> None:
        self.directory = Path(directory)
        new = self.index_class(settings=settings, prompts=prompts, rows_per_shard=rows_per_shard, shards={})
        _check_directory(self.directory, what=new.what)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.directory, command=new.command)
        try:
            if overwrite:
                _delete(self.directory, {*written_files(self.directory), *new.files})
            shards = _earlier(self.directory, new)
            self.damaged = {number: found for number, shard in shards.items() if (found := shard.problem(self.directory))}
            self.index = replace(new, shards={n: shard for n, shard in shards.items() if n not in self.damaged})
            self.index.save(self.directory)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets another process write here."""
        os.close(self._lock)

    @property
    def missing(self) -> list[int]:
        """The shards still to be written, in order."""
        return [i for i in range(self.index.n_shards) if i not in self.index.shards]

    def prompts(self, shard: int) -> range:
        """The prompts of a shard."""
        start = shard * self.index.rows_per_shard
        return range(start, min(start + self.index.rows_per_shard, self.index.prompts))


def _check_directory(directory: Path, *, what: str) -> None:
    """ValueError where shards would be written among other files."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir {directory} is a file: choose a directory")
    others = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if others and INDEX_FILE not in others:
        raise ValueError(
            f"{directory} is not empty and holds no {what} ({', '.join(others[:3])} ...): choose another output_dir"
        )


def _locked(directory: Path, *, command: str) -> int:
    """A descriptor that only one process has; the system frees it when the process ends, however it ends."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"another {command} is writing to {directory}: wait for it, or choose another output_dir") from None
    return lock


def _delete(directory: Path, patterns: Collection[str]) -> None:
    """Only what a run writes; the index goes last, so that a stop in between leaves a directory that is known."""
    for pattern in sorted(patterns, key=lambda pattern: pattern.startswith(INDEX_FILE)):
        for path in directory.glob(pattern):
            path.unlink()


def _earlier(directory: Path, new: ShardIndex[ShardT]) -> Mapping[int, ShardT]:
    """The finished shards of an earlier run with the same settings."""
    if not (directory / INDEX_FILE).is_file():
        return {}
    held = type(new).load(directory)
    if changed := held.changes(new.settings):
        raise ValueError(
            f"{directory} holds {new.what} made with other options ({'; '.join(changed)}): type them as they were to continue, "
            "choose another output_dir, or add --overwrite true"
        )
    return held.shards

"""Writing traces so that a killed run loses one batch at most, and the files come out the same."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from kdlib.data.traces.index import INDEX_FILE, Shard, Skipped, TraceIndex
from kdlib.data.traces.reader import damage, shard_file
from kdlib.files import write_whole

WRITTEN = ("shard-*.jsonl*", "correct.jsonl*", "incorrect.jsonl*", "report.*", "metrics.jsonl", INDEX_FILE + "*")

Trace = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What came of some prompts: the traces kept and the completions skipped."""

    traces: Sequence[Trace]
    skipped: Sequence[Skipped]


class TraceWriter:
    """Shard i holds ``rows_per_shard`` prompts, answered ``prompts_per_batch`` at a time.

    ``batches(shard)`` are the prompts of each batch, ``kept(shard)`` those that an earlier run left in the shard's
    ``.partial.jsonl``, to which ``append`` adds one; ``finish`` writes the shard whole and lists it. A directory of the same
    ``settings`` is continued: ``missing`` names the shards still to write. Raises ValueError naming the changed settings
    otherwise, for a directory of something else, and while another process writes there.
    """

    def __init__(
        self,
        directory: str | Path,
        settings: Mapping[str, Any],
        *,
        prompts: int,
        rows_per_shard: int,
        prompts_per_batch: int,
        overwrite: bool = False,
    ) -> None:
        self.directory, self.prompts_per_batch = Path(directory), prompts_per_batch
        _check_directory(self.directory)
        self.directory.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.directory)
        try:
            if overwrite:
                _delete(self.directory)
            shards = _earlier(self.directory, settings)
        except BaseException:
            self.close()
            raise
        self.damaged = {number: problem for number, shard in shards.items() if (problem := damage(self.directory, shard))}
        self.index = TraceIndex(
            settings=settings,
            prompts=prompts,
            rows_per_shard=rows_per_shard,
            shards={number: shard for number, shard in shards.items() if number not in self.damaged},
        )
        self.index.save(self.directory)

    def close(self) -> None:
        """Lets another process write here."""
        os.close(self._lock)

    @property
    def missing(self) -> list[int]:
        """The shards still to be written, in order."""
        return [i for i in range(self.index.n_shards) if i not in self.index.shards]

    def batches(self, shard: int) -> list[range]:
        """The prompts of each batch of a shard: always the same, because a batch's numerics depend on what is in it."""
        start = shard * self.index.rows_per_shard
        end = min(start + self.index.rows_per_shard, self.index.prompts)
        return [range(i, min(i + self.prompts_per_batch, end)) for i in range(start, end, self.prompts_per_batch)]

    def kept(self, shard: int) -> list[Batch]:
        """The batches that a stopped run left of this shard; a last line that it did not finish is cut off the file."""
        path, found, whole = self._partial(shard), [], 0
        for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
            batch = _batch(line)
            if batch is None:
                break
            found.append(batch)
            whole += len(line)
        if path.is_file():
            os.truncate(path, whole)
        return found

    def append(self, shard: int, batch: Batch) -> None:
        """Adds a batch to the shard's partial file; it is safe on disk on return."""
        append_line(self._partial(shard), asdict(batch))

    def finish(self, shard: int, batches: Sequence[Batch]) -> None:
        """Writes the shard's file whole, lists it in the index, and removes the partial file."""
        traces = [trace for batch in batches for trace in batch.traces]
        content = "".join(line(trace) for trace in traces).encode()
        write_whole(self.directory / shard_file(shard), content)
        made = Shard(
            file=shard_file(shard),
            prompts=sum(len(prompts) for prompts in self.batches(shard)),
            traces=len(traces),
            bytes=len(content),
            xxh3_128=xxhash.xxh3_128_hexdigest(content),
            skipped=tuple(skipped for batch in batches for skipped in batch.skipped),
        )
        self.index.shards[shard] = made
        self.index.save(self.directory)
        self._partial(shard).unlink(missing_ok=True)

    def _partial(self, shard: int) -> Path:
        return self.directory / shard_file(shard).replace(".jsonl", ".partial.jsonl")


def _check_directory(directory: Path) -> None:
    """ValueError where traces would be written among other files."""
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"output_dir {directory} is a file: choose a directory")
    others = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if others and INDEX_FILE not in others:
        raise ValueError(
            f"{directory} is not empty and holds no traces ({', '.join(others[:3])} ...): choose another output_dir"
        )


def _earlier(directory: Path, settings: Mapping[str, Any]) -> Mapping[int, Shard]:
    """The finished shards of an earlier run with the same settings."""
    if not (directory / INDEX_FILE).is_file():
        return {}
    held = TraceIndex.load(directory)
    changed = held.changes(settings)
    if changed:
        raise ValueError(
            f"{directory} holds traces made with other options ({'; '.join(changed)}): type them as they were to continue, "
            "choose another output_dir, or add --overwrite true"
        )
    return held.shards


def _delete(directory: Path) -> None:
    """Only what a run writes; the index goes last, so that a stop in between leaves a directory that is known."""
    for pattern in WRITTEN:
        for path in directory.glob(pattern):
            path.unlink()


def append_line(path: Path, content: Any) -> None:
    """Adds a JSON line to a file; it is safe on disk on return."""
    with path.open("ab") as file:
        file.write(line(content).encode())
        file.flush()
        os.fsync(file.fileno())


def cut_torn_line(path: Path) -> None:
    """Takes away what a killed process left behind a file's last line break."""
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that appears whole or not at all, for content that is not to be held in memory."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def line(content: Any) -> str:
    """JSON and a line break; text as it is, without escapes (but for lone surrogates, which UTF-8 has no bytes for)."""
    text = json.dumps(content, ensure_ascii=False)
    return (text if text.isascii() or _encodable(text) else json.dumps(content)) + "\n"


def _encodable(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _batch(line: bytes) -> Batch | None:
    """A batch from a line of a partial file, None for a torn one."""
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
        return Batch(traces=content["traces"], skipped=[Skipped(**skipped) for skipped in content["skipped"]])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return None


def _locked(directory: Path) -> int:
    """A descriptor that only one process has; the system frees it when the process ends, however it ends."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(
            f"another kdlib generate is writing to {directory}: wait for it, or choose another output_dir"
        ) from None
    return lock

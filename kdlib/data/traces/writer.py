"""Writing traces so that a killed run loses one batch at most, and the files come out the same."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from kdlib.data.shard_writer import ShardWriter
from kdlib.data.traces.index import Shard, Skipped, TraceIndex
from kdlib.files import write_whole

Trace = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What came of some prompts: the traces kept and the completions skipped."""

    traces: Sequence[Trace]
    skipped: Sequence[Skipped]


class TraceWriter(ShardWriter[TraceIndex]):
    """Shard i holds ``rows_per_shard`` prompts, answered ``prompts_per_batch`` at a time.

    ``batches(shard)`` are the prompts of each batch, ``kept(shard)`` those that an earlier run left in the shard's
    ``.partial.jsonl``, to which ``append`` adds one; ``finish`` writes the shard whole and lists it. ``options``: those of
    ``ShardWriter``.
    """

    index_class = TraceIndex

    def __init__(
        self,
        directory: str | Path,
        settings: Mapping[str, Any],
        *,
        prompts_per_batch: int,
        **options: Any,
    ) -> None:
        self.prompts_per_batch = prompts_per_batch
        super().__init__(directory, settings, **options)

    def batches(self, shard: int) -> list[range]:
        """The prompts of each batch of a shard: always the same, because a batch's numerics depend on what is in it."""
        prompts, size = self.prompts(shard), self.prompts_per_batch
        return [prompts[start : start + size] for start in range(0, len(prompts), size)]

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
            prompts=len(self.prompts(shard)),
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


def shard_file(number: int) -> str:
    return f"shard-{number:05d}.jsonl"


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

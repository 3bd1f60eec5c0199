"""Reading a cache: checked when it is opened, memory-mapped, looked up by sample id."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm

from kdlib.data.cache.codec import Signals, Stored
from kdlib.data.cache.index import CacheIndex

_PER_TOKEN = ("ids", "ids_high", "logp", "rest")
_BAR_DELAY = 2.0  # seconds; a check that is done sooner needs no bar


class CacheReader:
    """The signals of a finished cache, by sample id.

    verify: also compare every shard's checksum (reads the whole cache once); sizes are always compared.
    Raises FileNotFoundError when there is no cache, ValueError for one unfinished, altered or of another
    format.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.index = CacheIndex.load(self.directory)
        self.meta = self.index.meta
        self._check_complete()
        self._check_files(verify)
        self._shards = [_mapped(self.directory / shard.file) for shard in self.index.shards]
        self._shard_end = np.cumsum([shard.tokens for shard in self.index.shards])
        sample_id = np.concatenate([shard["sample_id"] for shard in self._shards])
        count = np.concatenate([shard["count"] for shard in self._shards]).astype(np.int64)
        order = np.argsort(sample_id, kind="stable")
        self._sample_id, self._count = sample_id[order], count[order]
        self._start = (np.cumsum(count) - count)[order]

    def _check_complete(self) -> None:
        if not self.index.complete:
            done, rows = self.index.summary["dataset_rows"], self.meta.dataset_size
            raise ValueError(
                f"the cache {self.directory} is unfinished ({done} of {rows} rows): "
                "run the same `kdlib cache` command again to continue it"
            )

    def _check_files(self, verify: bool) -> None:
        bar = tqdm(self.index.shards, desc="Checking cache", unit="shard", delay=_BAR_DELAY, leave=False)
        for shard in bar:
            path = self.directory / shard.file
            problem = size_problem(path, shard.bytes)
            if problem is None and verify and checksum(path) != shard.xxh3_128:
                problem = "altered: its checksum differs"
            if problem is not None:
                raise ValueError(f"cache file {path} is {problem}; delete it and run the same `kdlib cache` command again")

    def check_fingerprints(self, *, tokenizer: str, template: str) -> None:
        """Raises ValueError when the cache was written with another tokenizer, or another chat template."""
        if tokenizer != self.meta.tokenizer:
            raise ValueError(
                f"the cache {self.directory} was written with another tokenizer ({self.meta.tokenizer}, "
                f"yours is {tokenizer}): use that one, or write a cache for yours with `kdlib cache`"
            )
        if template != self.meta.template:
            raise ValueError(
                f"the cache {self.directory} was written with another chat template, chat_template_kwargs or "
                f"tools ({self.meta.template}, yours are {template}): use those, or write a cache for yours "
                "with `kdlib cache`"
            )

    def holds(self, sample_id: NDArray) -> NDArray:
        """Which of these sequences [r] are in the cache."""
        at = np.searchsorted(self._sample_id, sample_id).clip(max=len(self._sample_id) - 1)
        return self._sample_id[at] == sample_id

    def locate(self, sample_id: NDArray) -> tuple[NDArray, NDArray]:
        """(first token, number of tokens) [r] of these sequences; of one that is stored twice, the first.

        Raises ValueError for a sequence that is not in the cache.
        """
        at = np.searchsorted(self._sample_id, sample_id).clip(max=len(self._sample_id) - 1)
        absent = self._sample_id[at] != sample_id
        if absent.any():
            raise ValueError(
                f"{absent.sum()} of {len(absent)} samples of the batch are not in the cache {self.directory} "
                f"(the first is {sample_id[absent][0]}): run `kdlib cache` with the same dataset, max_length "
                "and chat template"
            )
        return self._start[at], self._count[at]

    def read(self, tokens: NDArray) -> Signals:
        """The signals of these tokens [n], numbered as by ``locate``, in their order."""
        shard_of = np.searchsorted(self._shard_end, tokens, side="right")
        shards = np.unique(shard_of)
        if len(shards) == 1:
            return self._read_shard(int(shards[0]), tokens)
        groups = [np.flatnonzero(shard_of == shard) for shard in shards]
        parts = [self._read_shard(int(s), tokens[g]) for s, g in zip(shards, groups, strict=True)]
        return _reordered(Signals.joined(parts), order=np.concatenate(groups))

    def _read_shard(self, shard: int, tokens: NDArray) -> Signals:
        local = tokens - (self._shard_end[shard] - self.index.shards[shard].tokens)
        stored = self._shards[shard]
        taken = {name: np.take(x, local, axis=0) if name in _PER_TOKEN else x for name, x in stored.items()}
        return self.meta.codec.decode(taken)


def _reordered(signals: Signals, *, order: NDArray) -> Signals:
    """Row i of ``signals`` goes to row ``order[i]``."""
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    rest = None if signals.rest is None else signals.rest[back]
    return Signals(ids=signals.ids[back], logp=signals.logp[back], rest=rest)


def size_problem(path: Path, expected: int) -> str | None:
    """What is wrong with a file of ``expected`` bytes, None when it has them."""
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    return None if size == expected else f"truncated or altered: {size} bytes instead of {expected}"


def checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _mapped(path: Path) -> Stored:
    """The arrays of a shard: views of the mapped file, read from disk when they are touched."""
    try:
        with safe_open(path, "pt") as file:  # the torch side maps, the numpy side copies
            return {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"cache file {path} cannot be read ({error}): open the cache with verify=True") from error

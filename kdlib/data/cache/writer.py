"""Writing a cache shard by shard, so that an interrupted writing loses one shard at most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from safetensors.numpy import save

from kdlib.data.cache.codec import Codec, Signals, Stored
from kdlib.data.cache.index import INDEX_FILE, CacheIndex, CacheMeta, Shard
from kdlib.files import write_whole


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some sequences: ``sample_id`` [r], ``count`` [r] of scored positions, ``signals`` [sum of count]."""

    sample_id: NDArray
    count: NDArray
    signals: Signals


class CacheWriter:
    """Shard i holds the dataset rows ``rows(i)``; each is written atomically, then listed in cache.json.

    A directory that holds a cache of the same ``meta`` is continued: ``missing`` names the shards still to
    write. Raises ValueError naming the changed keys when it holds another cache.
    """

    def __init__(self, directory: str | Path, meta: CacheMeta) -> None:
        self.directory, self.meta = Path(directory), meta
        self._done: dict[int, Shard] = {}
        self.directory.mkdir(parents=True, exist_ok=True)
        if (self.directory / INDEX_FILE).exists():
            self._done = {shard.index: shard for shard in self._earlier() if self._is_whole(shard)}
        self.index.save(self.directory)

    def _earlier(self) -> tuple[Shard, ...]:
        earlier = CacheIndex.load(self.directory)
        changes = earlier.meta.changes(self.meta)
        if changes:
            raise ValueError(
                f"{self.directory} holds a cache made otherwise ({'; '.join(changes)}): "
                "choose another directory, or delete this one"
            )
        return earlier.shards

    def _is_whole(self, shard: Shard) -> bool:
        path = self.directory / shard.file
        return path.is_file() and path.stat().st_size == shard.bytes

    @property
    def index(self) -> CacheIndex:
        """What is on disk now."""
        return CacheIndex(meta=self.meta, shards=tuple(self._done[i] for i in sorted(self._done)))

    @property
    def missing(self) -> list[int]:
        """The shards still to be written, in order."""
        return [i for i in range(self.meta.n_shards) if i not in self._done]

    def rows(self, shard: int) -> range:
        """The dataset rows of a shard."""
        start = shard * self.meta.rows_per_shard
        return range(start, min(start + self.meta.rows_per_shard, self.meta.dataset_size))

    def write(self, shard: int, blocks: Sequence[Block]) -> None:
        """Write all sequences of the shard's dataset rows, in any order; they are safe on disk on return."""
        signals = Signals.joined([block.signals for block in blocks])
        rows = {
            "sample_id": np.concatenate([block.sample_id for block in blocks]).astype(np.int64),
            "count": np.concatenate([block.count for block in blocks]).astype(np.int32),
        }
        self._check(signals, rows["count"])
        stored = self.meta.codec.encode(signals)
        error_max, error_mean = _error(signals, stored, codec=self.meta.codec)
        content = save(stored | rows)
        file = f"shard-{shard:06d}.safetensors"
        write_whole(self.directory / file, content)
        self._done[shard] = Shard(
            index=shard,
            file=file,
            dataset_rows=len(self.rows(shard)),
            sequences=len(rows["count"]),
            tokens=len(signals),
            bytes=len(content),
            xxh3_128=xxhash.xxh3_128_hexdigest(content),
            error_max=error_max,
            error_mean=error_mean,
        )
        self.index.save(self.directory)

    def _check(self, signals: Signals, count: NDArray) -> None:
        if count.sum() != len(signals):
            raise ValueError(f"the sequences have {count.sum()} scored positions, the signals {len(signals)}")
        if signals.ids.shape[1] != self.meta.k:
            raise ValueError(f"the cache holds {self.meta.k} ids a position, the signals {signals.ids.shape[1]}")
        if len(signals) and not 0 <= signals.ids.min() <= signals.ids.max() < self.meta.vocab_size:
            raise ValueError(f"a token id is outside the vocabulary of {self.meta.vocab_size} entries")


def _error(signals: Signals, stored: Stored, *, codec: Codec) -> tuple[float, float]:
    """(max, mean) of |stored - given| over the finite log-probs and rests, nats."""
    decoded = codec.decode(stored)
    pairs = [(signals.logp, decoded.logp)]
    if signals.rest is not None and decoded.rest is not None:
        pairs.append((signals.rest, decoded.rest))
    given, kept = (np.concatenate([np.ravel(x[side]).astype(np.float32) for x in pairs]) for side in (0, 1))
    finite = np.isfinite(given) & np.isfinite(kept)
    if not finite.any():
        return 0.0, 0.0
    gap = np.abs(given[finite] - kept[finite])
    return float(gap.max()), float(gap.mean(dtype=np.float64))

"""``cache.json``: what a cache holds, for which data and tokenizer, and which shards are safely on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kdlib.data.cache.codec import Codec
from kdlib.files import write_whole

INDEX_FILE = "cache.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CacheMeta:
    """Everything a cache's content depends on; a writing resumes only when all of it is equal.

    kind: ``topk`` (k likeliest tokens and the log mass outside), ``sampled`` (k tokens drawn from p) or ``given`` (the token
        that is in the row, k = 1).
    tokenizer, template, dataset: fingerprints; dataset_size counts dataset rows (a packed row is one).
    seed: of the draws; None for topk and given. Raises ValueError for values that make no cache.
    """

    kind: str
    k: int
    vocab_size: int
    logp_bits: int
    temperature: float
    teacher: str
    tokenizer: str
    template: str
    dataset: str
    dataset_size: int
    rows_per_shard: int
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("topk", "sampled", "given"):
            raise ValueError(f"kind={self.kind!r}: a cache is topk, sampled or given")
        if self.kind == "given" and self.k != 1:
            raise ValueError(f"k={self.k}: a cache of kind given keeps one log-prob per token, that of the row's own")
        if self.k < 1 or (self.kind == "topk" and self.k > self.vocab_size):
            raise ValueError(f"k={self.k}: choose between 1 and the vocabulary's {self.vocab_size} entries")
        if self.logp_bits not in (8, 16, 32):
            raise ValueError(f"bits={self.logp_bits}: log-probs are stored in 32, 16 or 8 bits")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: it must be above 0")
        if self.dataset_size < 1 or self.rows_per_shard < 1:
            raise ValueError(f"{self.dataset_size} rows, {self.rows_per_shard} a shard: both must be at least 1")

    @property
    def id_bits(self) -> int:
        """Bits per token id: 16, or what the vocabulary needs."""
        return max(16, (self.vocab_size - 1).bit_length())

    @property
    def codec(self) -> Codec:
        return Codec(id_bits=self.id_bits, logp_bits=self.logp_bits)

    @property
    def n_shards(self) -> int:
        return -(-self.dataset_size // self.rows_per_shard)

    def changes(self, other: CacheMeta) -> list[str]:
        """``key: ours -> theirs`` of every field that differs."""
        ours, theirs = asdict(self), asdict(other)
        return [f"{key}: {ours[key]} -> {theirs[key]}" for key in ours if ours[key] != theirs[key]]


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A finished file: the ``index``-th rows_per_shard rows of the dataset.

    ``sequences`` (a packed row has several) with ``tokens`` scored positions in all; ``error_max`` and
    ``error_mean`` of its finite log-probs: |stored - given|, nats.
    """

    index: int
    file: str
    dataset_rows: int
    sequences: int
    tokens: int
    bytes: int
    xxh3_128: str
    error_max: float
    error_mean: float


@dataclass(frozen=True, kw_only=True)
class CacheIndex:
    """``meta`` and the shards written so far, in order."""

    meta: CacheMeta
    shards: tuple[Shard, ...] = ()

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.meta.n_shards

    @property
    def summary(self) -> dict[str, Any]:
        """Totals over the shards, bytes per token, and the error of the stored log-probs (nats)."""
        tokens, size = sum(s.tokens for s in self.shards), sum(s.bytes for s in self.shards)
        return {
            "complete": self.complete,
            "dataset_rows": sum(s.dataset_rows for s in self.shards),
            "sequences": sum(s.sequences for s in self.shards),
            "tokens": tokens,
            "bytes": size,
            "bytes_per_token": round(size / max(tokens, 1), 3),
            "error_max": max((s.error_max for s in self.shards), default=0.0),
            "error_mean": sum(s.error_mean * s.tokens for s in self.shards) / max(tokens, 1),
        }

    def save(self, directory: Path) -> None:
        """Rewrites cache.json as a whole or not at all."""
        content = {
            "format_version": FORMAT_VERSION,
            "meta": asdict(self.meta) | {"id_bits": self.meta.id_bits},
            "summary": self.summary,
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_whole(directory / INDEX_FILE, json.dumps(content, indent=1) + "\n")

    @staticmethod
    def load(directory: Path) -> CacheIndex:
        """Raises FileNotFoundError without a cache.json, ValueError for one that this version cannot read."""
        path = directory / INDEX_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{directory} holds no {INDEX_FILE}: write one with `kdlib cache`")
        try:
            content = json.loads(path.read_text())
            _check_version(content["format_version"], directory)
            meta = CacheMeta(**{f.name: content["meta"][f.name] for f in fields(CacheMeta)})
            return CacheIndex(meta=meta, shards=tuple(Shard(**shard) for shard in content["shards"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            message = f"{path} is damaged ({error!r}): delete it and write the cache again with `kdlib cache`"
            raise ValueError(message) from error


def _check_version(version: int, directory: Path) -> None:
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{directory} has cache format {version}, this kdlib reads {FORMAT_VERSION}: "
            "install the kdlib that wrote it, or write the cache again with `kdlib cache`"
        )

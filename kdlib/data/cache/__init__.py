"""A teacher's truncated log-probs on disk: flat, fixed k, memory-mapped, read without a loop over tokens."""

from __future__ import annotations

from kdlib.data.cache.codec import Signals
from kdlib.data.cache.index import CacheIndex, CacheMeta, Shard
from kdlib.data.cache.reader import CacheReader
from kdlib.data.cache.writer import Block, CacheWriter

__all__ = ["Block", "CacheIndex", "CacheMeta", "CacheReader", "CacheWriter", "Shard", "Signals"]

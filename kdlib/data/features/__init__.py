"""Hidden states of a target on disk, for training EAGLE-3 heads without running it: three layers' features and the last ones.

A directory holds ``features.json`` (what it is, and each finished shard with its checksum), ``target.safetensors`` (the
target's embeddings and head, so that the target itself is not needed again), its tokenizer, and the shards.

Importing this package loads nothing heavy: each name is fetched from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

if TYPE_CHECKING:
    from kdlib.data.features.extraction import vllm_extraction
    from kdlib.data.features.index import FeatureMeta, FeatureShard
    from kdlib.data.features.reader import FeatureReader, StoredTarget
    from kdlib.data.features.writer import feature_bytes, write_features

_HOME = {
    "FeatureMeta": "index",
    "FeatureReader": "reader",
    "FeatureShard": "index",
    "StoredTarget": "reader",
    "feature_bytes": "writer",
    "vllm_extraction": "extraction",
    "write_features": "writer",
}

__all__ = [
    "FeatureMeta",
    "FeatureReader",
    "FeatureShard",
    "StoredTarget",
    "feature_bytes",
    "vllm_extraction",
    "write_features",
]

__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})

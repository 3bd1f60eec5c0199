"""``features.json``: which target's hidden states a directory holds, for which rows, and which shards are safely on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdlib.data.cache.reader import checksum
from kdlib.files import write_whole

INDEX_FILE, TARGET_FILE = "features.json", "target.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class FeatureMeta:
    """What a directory holds. ``layers``: ids as of Eagle3Config; ``rows``: fingerprint of the sample ids, in order."""

    target: str
    config: dict[str, Any]
    layers: list[int]
    dtype: str
    hidden_size: int
    rows: str
    scale: float
    softcap: float | None


@dataclass(frozen=True, kw_only=True)
class FeatureShard:
    """A finished file."""

    file: str
    rows: int
    tokens: int
    bytes: int
    xxh3_128: str


def save_index(directory: Path, meta: FeatureMeta, shards: Sequence[FeatureShard], *, complete: bool) -> None:
    target = directory / TARGET_FILE
    content = {
        "format_version": FORMAT_VERSION,
        "complete": complete,
        "tokens": sum(shard.tokens for shard in shards),
        "meta": asdict(meta),
        "target": {"bytes": target.stat().st_size, "xxh3_128": checksum(target)},
        "shards": [asdict(shard) for shard in sorted(shards, key=lambda shard: shard.file)],
    }
    write_whole(directory / INDEX_FILE, json.dumps(content, indent=1) + "\n")


def load_index(directory: Path) -> tuple[FeatureMeta, list[FeatureShard], dict[str, Any]]:
    path = directory / INDEX_FILE
    if not path.is_file():
        raise ValueError(f"{directory} holds no {INDEX_FILE}: write it with kdlib.data.features.write_features")
    try:
        content = json.loads(path.read_text())
        if content["format_version"] != FORMAT_VERSION:
            raise ValueError(f"{path} has format {content['format_version']}, this kdlib reads {FORMAT_VERSION}")
        return FeatureMeta(**content["meta"]), [FeatureShard(**shard) for shard in content["shards"]], content
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): write the features again") from error

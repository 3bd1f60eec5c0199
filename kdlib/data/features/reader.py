"""Reads hidden states by sample id, and what else was kept of their target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from kdlib.data.cache.reader import checksum, size_problem
from kdlib.data.features.index import TARGET_FILE, FeatureShard, load_index
from kdlib.head import Head


@dataclass(frozen=True, kw_only=True)
class StoredTarget:
    """What a head needs of its target beside hidden states."""

    config: PretrainedConfig
    embeddings: Tensor
    head: Head


class FeatureReader:
    """The features of a finished directory by sample id, memory-mapped.

    verify: compare every file's checksum (reads all of it once); sizes are always compared. ValueError for what is unfinished,
    truncated or altered.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.meta, shards, content = load_index(self.directory)
        if not content["complete"]:
            raise ValueError(f"the features in {directory} are unfinished: make the same call again")
        of_target = FeatureShard(file=TARGET_FILE, rows=0, tokens=0, **content["target"])
        for shard in (*shards, of_target):
            path = self.directory / shard.file
            problem = size_problem(path, shard.bytes)
            if problem is None and verify and checksum(path) != shard.xxh3_128:
                problem = "altered: its checksum differs"
            if problem is not None:
                raise ValueError(f"{path} is {problem}; delete it and write the features again")
        self._shards = [_mapped(self.directory / shard.file) for shard in shards]
        self._places: dict[int, tuple[int, int, int]] = {}
        for number, stored in enumerate(self._shards):
            start = 0
            for sample, length in zip(stored["sample_id"].tolist(), stored["length"].tolist(), strict=True):
                self._places[sample] = (number, start, start + length)
                start += length

    def __len__(self) -> int:
        return len(self._places)

    @property
    def has_tokenizer(self) -> bool:
        return (self.directory / "tokenizer_config.json").is_file()

    def read(self, sample: int, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(features [n, 3, Dt], last hidden states [n, Dt]) of a row; ValueError when it is not there or has other tokens."""
        if sample not in self._places:
            raise ValueError(f"sample {sample} is not among the features in {self.directory}: write them for these rows")
        number, start, end = self._places[sample]
        shard = self._shards[number]
        if not torch.equal(shard["input_ids"][start:end].long(), input_ids.long()):
            raise ValueError(f"sample {sample} has other tokens in {self.directory}: same tokenizer, template, max_length?")
        return shard["features"][start:end], shard["last"][start:end]

    @property
    def target(self) -> StoredTarget:
        """Configuration, embeddings and head of the target."""
        tensors = _mapped(self.directory / TARGET_FILE)
        weight = tensors.get("head.weight", tensors["embeddings"])
        head = Head(weight=weight, bias=tensors.get("head.bias"), scale=self.meta.scale, softcap=self.meta.softcap)
        config = AutoConfig.for_model(**self.meta.config)
        return StoredTarget(config=config, embeddings=tensors["embeddings"], head=head)


def _mapped(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

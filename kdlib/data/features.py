"""Hidden states of a target on disk, for training EAGLE-3 heads without running it: three layers' features and the last ones.

A directory holds ``features.json`` (what it is, and each finished shard with its checksum), ``target.safetensors`` (the
target's embeddings and head, so that the target itself is not needed again), its tokenizer, and the shards.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from kdlib.data.cache.reader import checksum, size_problem
from kdlib.drafts.eagle3 import FEATURES, check_feature_layers, default_feature_layers
from kdlib.files import write_whole
from kdlib.head import Head
from kdlib.models import hidden_states

logger = logging.getLogger("kdlib.features")

INDEX_FILE, TARGET_FILE = "features.json", "target.safetensors"
FORMAT_VERSION = 1
SHARD_BYTES = 2**30


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


@dataclass(frozen=True, kw_only=True)
class StoredTarget:
    """What a head needs of its target beside hidden states."""

    config: PretrainedConfig
    embeddings: Tensor
    head: Head


def feature_bytes(tokens: int, *, hidden_size: int, itemsize: int) -> int:
    """Bytes of ``tokens`` positions: three features and the last hidden state of each (Dt 4096 in 16 bits: 32 KiB)."""
    return tokens * (FEATURES + 1) * hidden_size * itemsize


def write_features(
    directory: str | Path,
    rows: Dataset,
    model: PreTrainedModel,
    *,
    name: str,
    max_gib: float,
    tokenizer: PreTrainedTokenizerBase | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Runs the target over prepared ``rows`` (``input_ids``, ``sample_id``; not packed) and writes its hidden states.

    name: the target's path or Hub id. The size is logged first; ValueError when it is above ``max_gib`` or the free space,
    before anything is written. The same call again writes the shards that are missing.
    """
    directory = Path(directory)
    text = model.config.get_text_config()
    layers = list(layers or default_feature_layers(text.num_hidden_layers))
    check_feature_layers(layers, num_layers=text.num_hidden_layers)
    lengths = [len(ids) for ids in rows["input_ids"]]
    itemsize = model.get_input_embeddings().weight.dtype.itemsize
    _check_size(directory, sum(lengths), hidden_size=text.hidden_size, itemsize=itemsize, max_gib=max_gib)
    per_shard = max(1, shard_bytes // feature_bytes(1, hidden_size=text.hidden_size, itemsize=itemsize))
    meta = _meta(model, rows, name=name, layers=layers)
    done = _begun(directory, meta)
    _write_target(directory, model)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    for number, shard in enumerate(tqdm(list(_groups(lengths, per_shard)), desc="features", unit="shard", delay=2.0)):
        file = f"shard-{number:06d}.safetensors"
        if file not in {finished.file for finished in done if size_problem(directory / file, finished) is None}:  # type: ignore[arg-type]
            done = [finished for finished in done if finished.file != file]
            done.append(_write_shard(directory / file, rows.select(shard), model, layers=layers, batch_size=batch_size))
            _save_index(directory, meta, done, complete=False)
    _save_index(directory, meta, done, complete=True)
    return directory


def _check_size(directory: Path, tokens: int, *, hidden_size: int, itemsize: int, max_gib: float) -> None:
    size = feature_bytes(tokens, hidden_size=hidden_size, itemsize=itemsize) / 2**30
    said = f"hidden states of {tokens} tokens take {size:.3f} GiB ({FEATURES + 1} x {hidden_size} x {itemsize} bytes each)"
    logger.info("%s", said)
    if size > max_gib:
        raise ValueError(f"{said}, more than max_gib {max_gib}: take fewer rows, or train with the target in memory")
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free / 2**30
    if size > free:
        raise ValueError(f"{said}, {directory} has {free:.3f} GiB left")


def _meta(model: PreTrainedModel, rows: Dataset, *, name: str, layers: list[int]) -> FeatureMeta:
    head, text = Head.of(model), model.config.get_text_config()
    ids = xxhash.xxh3_128_hexdigest(torch.tensor(rows["sample_id"]).numpy().tobytes())
    dtype = str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    return FeatureMeta(
        target=name,
        config=json.loads(model.config.to_json_string(use_diff=False)),
        layers=layers,
        dtype=dtype,
        hidden_size=text.hidden_size,
        rows=ids,
        scale=head.scale,
        softcap=head.softcap,
    )


def _begun(directory: Path, meta: FeatureMeta) -> list[FeatureShard]:
    """The shards of an earlier call; ValueError when it was another one."""
    if not (directory / INDEX_FILE).exists():
        return []
    earlier, shards, _ = _load_index(directory)
    if earlier != meta:
        changed = [key for key, value in asdict(meta).items() if asdict(earlier)[key] != value]
        raise ValueError(f"{directory} holds features made otherwise ({', '.join(changed)}): choose another directory")
    return list(shards)


def _groups(lengths: Sequence[int], tokens: int) -> Iterator[range]:
    """Consecutive rows of at most ``tokens`` tokens together, at least one."""
    start, total = 0, 0
    for row, length in enumerate(lengths):
        if total and total + length > tokens:
            yield range(start, row)
            start, total = row, 0
        total += length
    if total:
        yield range(start, len(lengths))


@torch.no_grad()
def _write_shard(path: Path, rows: Dataset, model: PreTrainedModel, *, layers: list[int], batch_size: int) -> FeatureShard:
    device, tokens = model.get_input_embeddings().weight.device, [torch.tensor(ids) for ids in rows["input_ids"]]
    features, last = [], []
    for start in range(0, len(tokens), batch_size):
        some = tokens[start : start + batch_size]
        mask = pad_sequence([torch.ones_like(ids) for ids in some], batch_first=True).to(device)
        batch = {"input_ids": pad_sequence(some, batch_first=True).to(device), "attention_mask": mask}
        hidden, found = hidden_states(model, batch, layers=tuple(layers))
        stacked = torch.stack([found[layer] for layer in layers], 2)
        features += [x[: len(ids)].cpu() for x, ids in zip(stacked, some, strict=True)]
        last += [x[: len(ids)].cpu() for x, ids in zip(hidden, some, strict=True)]
    content = save(
        {
            "sample_id": torch.tensor(rows["sample_id"]),
            "length": torch.tensor([len(ids) for ids in tokens]),
            "input_ids": torch.cat(tokens).int(),
            "features": torch.cat(features),
            "last": torch.cat(last),
        }
    )
    write_whole(path, content)
    return FeatureShard(
        file=path.name,
        rows=len(tokens),
        tokens=sum(map(len, tokens)),
        bytes=len(content),
        xxh3_128=xxhash.xxh3_128_hexdigest(content),
    )


def _write_target(directory: Path, model: PreTrainedModel) -> None:
    head, embeddings = Head.of(model), model.get_input_embeddings().weight
    tensors = {"embeddings": embeddings}
    if head.weight.data_ptr() != embeddings.data_ptr():
        tensors["head.weight"] = head.weight
    if head.bias is not None:
        tensors["head.bias"] = head.bias
    write_whole(directory / TARGET_FILE, save({key: x.detach().cpu().contiguous() for key, x in tensors.items()}))


def _save_index(directory: Path, meta: FeatureMeta, shards: Sequence[FeatureShard], *, complete: bool) -> None:
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


def _load_index(directory: Path) -> tuple[FeatureMeta, list[FeatureShard], dict[str, Any]]:
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


class FeatureReader:
    """The features of a finished directory by sample id, memory-mapped.

    verify: compare every file's checksum (reads all of it once); sizes are always compared. ValueError for what is unfinished,
    truncated or altered.
    """

    def __init__(self, directory: str | Path, *, verify: bool = True) -> None:
        self.directory = Path(directory)
        self.meta, shards, content = _load_index(self.directory)
        if not content["complete"]:
            raise ValueError(f"the features in {directory} are unfinished: make the same call again")
        of_target = FeatureShard(file=TARGET_FILE, rows=0, tokens=0, **content["target"])
        for shard in (*shards, of_target):
            path = self.directory / shard.file
            problem = size_problem(path, shard)  # type: ignore[arg-type]
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


def vllm_extraction(layers: Sequence[int], *, num_layers: int, storage: str | Path) -> dict[str, Any]:
    """Options of ``vllm.LLM`` (or, as JSON, of ``vllm serve``) that make it write hidden states of prompts under ``storage``.

    Each request's ``kv_transfer_params["hidden_states_path"]`` then names a safetensors file with ``token_ids`` [n] and
    ``hidden_states`` [n, 4, Dt], the last of which is the residual stream BEFORE the final norm: apply the target's norm before
    its head. ValueError without CUDA, which this method of vLLM needs. Not run yet.
    """
    check_feature_layers(layers, num_layers=num_layers)
    if not torch.cuda.is_available():
        raise ValueError("vLLM's extract_hidden_states needs CUDA: use write_features with the target in transformers")
    ids = {"eagle_aux_hidden_state_layer_ids": [*layers, num_layers]}
    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,
            "draft_model_config": {"hf_config": ids},
        },
        "kv_transfer_config": {
            "kv_connector": "ExampleHiddenStatesConnector",
            "kv_role": "kv_producer",
            "kv_connector_extra_config": {"shared_storage_path": str(storage)},
        },
    }

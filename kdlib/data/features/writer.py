"""Runs a target over rows and writes its hidden states in shards."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import xxhash
from datasets import Dataset
from safetensors.torch import save
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdlib.data.cache.reader import size_problem
from kdlib.data.features.index import INDEX_FILE, TARGET_FILE, FeatureMeta, FeatureShard, load_index, save_index
from kdlib.drafts.eagle3_config import FEATURES, check_feature_layers, default_feature_layers
from kdlib.files import write_whole
from kdlib.head import Head
from kdlib.models import hidden_states

logger = logging.getLogger("kdlib.features")

SHARD_BYTES = 2**30


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
        if file not in {finished.file for finished in done if size_problem(directory / file, finished.bytes) is None}:
            done = [finished for finished in done if finished.file != file]
            done.append(_write_shard(directory / file, rows.select(shard), model, layers=layers, batch_size=batch_size))
            save_index(directory, meta, done, complete=False)
    save_index(directory, meta, done, complete=True)
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
    earlier, shards, _ = load_index(directory)
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

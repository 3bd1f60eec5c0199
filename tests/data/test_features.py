"""Hidden states on disk: what is written is what the target says, and what is damaged is not read."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from kdlib.data.features import FeatureReader, feature_bytes, vllm_extraction, write_features
from kdlib.head import Head
from tests.tiny import tiny_llama, tiny_tokenizer

V = 96


def rows(count: int = 7) -> Dataset:
    torch.manual_seed(2)
    ids = [torch.randint(3, V, (3 + 4 * i % 9,)).tolist() for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "sample_id": [100 - i for i in range(count)]})


def target(**config: Any) -> Any:
    return tiny_llama(V, layers=4, **config)


def written(directory: Path, **options: Any) -> Path:
    given = {"name": "org/target", "max_gib": 1.0, "batch_size": 3, "shard_bytes": 8192, **options}
    return write_features(directory, given.pop("rows", rows()), given.pop("model", target()), **given)


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, True), (torch.bfloat16, False)])
def test_what_is_read_is_what_the_target_says(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = target(tie_word_embeddings=tied).to(dtype)
    directory = written(tmp_path, model=model, layers=[0, 2, 3], tokenizer=tiny_tokenizer())
    reader = FeatureReader(directory)
    assert len(list(directory.glob("shard-*"))) > 1 and len(reader) == 7 and reader.has_tokenizer
    for row in rows():
        ids = torch.tensor(row["input_ids"])
        with torch.no_grad():
            out = model.model(input_ids=ids[None], output_hidden_states=True)
        features, last = reader.read(row["sample_id"], ids)
        assert features.dtype == last.dtype == dtype
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        for i, layer in enumerate([0, 2, 3]):
            torch.testing.assert_close(features[:, i], out.hidden_states[layer][0], **tolerance)
        torch.testing.assert_close(last, out.last_hidden_state[0], **tolerance)
    found = reader.target
    assert found.config.to_dict() == model.config.to_dict()
    assert torch.equal(found.embeddings, model.model.embed_tokens.weight)
    assert torch.equal(found.head(last), Head.of(model)(last))


def test_the_size_is_said_first_and_can_be_too_much(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokens = sum(len(ids) for ids in rows()["input_ids"])
    size = feature_bytes(tokens, hidden_size=32, itemsize=4)
    assert feature_bytes(1, hidden_size=4096, itemsize=2) == 32 * 1024
    with caplog.at_level(logging.INFO, "kdlib.features"), pytest.raises(ValueError, match=f"of {tokens} tokens take"):
        written(tmp_path / "new", max_gib=size / 2**30 / 1.01)
    assert f"hidden states of {tokens} tokens" in caplog.text and not (tmp_path / "new").exists()
    written(tmp_path / "new", max_gib=size / 2**30 * 1.01)
    stored = sum(path.stat().st_size for path in (tmp_path / "new").glob("shard-*"))
    assert size <= stored <= size * 1.2


def test_an_interrupted_writing_goes_on_and_another_one_is_refused(tmp_path: Path) -> None:
    directory = written(tmp_path)
    index = json.loads((directory / "features.json").read_text())
    lost = directory / index["shards"][1]["file"]
    content, kept = lost.read_bytes(), directory / index["shards"][0]["file"]
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    (directory / "features.json").write_text(json.dumps({**index, "complete": False, "shards": index["shards"][:1]}))
    with pytest.raises(ValueError, match="unfinished"):
        FeatureReader(directory)
    written(directory)
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == stamp
    FeatureReader(directory)
    with pytest.raises(ValueError, match="made otherwise \\(layers"):
        written(directory, layers=[0, 1, 2])


@pytest.mark.parametrize("file", ["shard-000001.safetensors", "target.safetensors"])
def test_truncated_and_altered_files_are_refused(tmp_path: Path, file: str) -> None:
    directory = written(tmp_path)
    path = directory / file
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="truncated"):
        FeatureReader(directory, verify=False)
    path.write_bytes(content[:-4] + b"\x01\x02\x03\x04")
    with pytest.raises(ValueError, match="altered"):
        FeatureReader(directory)
    path.unlink()
    with pytest.raises(ValueError, match="missing"):
        FeatureReader(directory)


def test_rows_that_are_not_there_or_other_ones(tmp_path: Path) -> None:
    reader = FeatureReader(written(tmp_path))
    row = rows()[0]
    with pytest.raises(ValueError, match="sample 5 is not"):
        reader.read(5, torch.tensor(row["input_ids"]))
    with pytest.raises(ValueError, match="other tokens"):
        reader.read(row["sample_id"], torch.tensor([*row["input_ids"][:-1], 1]))
    with pytest.raises(ValueError, match=r"no features\.json"):
        FeatureReader(tmp_path / "nothing")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said without CUDA")
def test_vllm_extraction_needs_cuda() -> None:
    with pytest.raises(ValueError, match="needs CUDA"):
        vllm_extraction([1, 2, 3], num_layers=4, storage="states")
    with pytest.raises(ValueError, match="distinct rising"):
        vllm_extraction([1, 2, 2], num_layers=4, storage="states")

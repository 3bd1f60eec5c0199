"""The cache format on synthetic signals: sizes, round trips, refusals, killed and continued writing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import kdlib
from kdlib.data.cache import Block, CacheMeta, CacheReader, CacheWriter, Signals
from kdlib.data.cache.codec import Codec

META = CacheMeta(
    kind="topk",
    k=8,
    vocab_size=151936,
    logp_bits=16,
    temperature=1.0,
    teacher="synthetic",
    tokenizer="tok",
    template="tem",
    dataset="data",
    dataset_size=10,
    rows_per_shard=4,
)


def made(tokens: int, *, k: int, vocab_size: int, seed: int = 0, sampled: bool = False) -> Signals:
    """Log-probs from -1e-3 to about -20, sorted, and ids over the whole vocabulary, its ends included."""
    rng = np.random.default_rng(seed)
    logits = np.sort(rng.normal(0, 4, (tokens, k + 1)), axis=-1)[:, ::-1]
    logp = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
    ids = rng.integers(0, vocab_size, (tokens, k)).astype(np.int32)
    ids[0, 0], ids[-1, -1] = 0, vocab_size - 1
    return Signals(ids=ids, logp=logp[:, :k], rest=None if sampled else logp[:, k])


def row(index: int, *, meta: CacheMeta) -> Block:
    """Dataset row ``index``: sample id 1000 - 7 * index, 90 to 110 positions."""
    count = 90 + 7 * index % 21
    signals = made(count, k=meta.k, vocab_size=meta.vocab_size, seed=index)
    return Block(sample_id=np.array([1000 - 7 * index]), count=np.array([count]), signals=signals)


def write_all(directory: Path, meta: CacheMeta, *, pause: float = 0.0) -> CacheWriter:
    writer = CacheWriter(directory, meta)
    for shard in writer.missing:
        writer.write(shard, [row(index, meta=meta) for index in writer.rows(shard)])
        time.sleep(pause)
    return writer


def read_rows(reader: CacheReader, sample_ids: NDArray) -> list[Signals]:
    start, count = reader.locate(sample_ids)
    return [reader.read(np.arange(s, s + n)) for s, n in zip(start, count, strict=True)]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("vocab_size", [128256, 151936, 262144])
@pytest.mark.parametrize(("k", "bits", "limit"), [(8, 16, 36), (64, 16, 280), (8, 8, 28), (64, 8, 210)])
def test_bytes_per_token_of_everything_on_disk(tmp_path: Path, k: int, bits: int, limit: float, vocab_size: int) -> None:
    meta = replace(META, k=k, logp_bits=bits, vocab_size=vocab_size, dataset_size=100, rows_per_shard=100)
    tokens = write_all(tmp_path, meta).index.summary["tokens"]
    assert 9000 < tokens < 11000
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) / tokens <= limit


@pytest.mark.parametrize("vocab_size", [1000, 65536, 65537, 151936, 262144, 300000])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize(("kind", "k"), [("topk", 13), ("sampled", 13), ("given", 1)])
def test_round_trip(tmp_path: Path, vocab_size: int, bits: int, kind: str, k: int) -> None:
    meta = replace(META, k=k, vocab_size=vocab_size, logp_bits=bits, kind=kind, dataset_size=1, rows_per_shard=1)
    given_ = made(300, k=k, vocab_size=vocab_size, sampled=kind != "topk")
    writer = CacheWriter(tmp_path, meta)
    writer.write(0, [Block(sample_id=np.array([5]), count=np.array([300]), signals=given_)])
    (found,) = read_rows(CacheReader(tmp_path), np.array([5]))
    assert np.array_equal(found.ids, given_.ids)
    assert (found.rest is None) == (kind != "topk")
    pairs = [(given_.logp, found.logp)] + ([] if found.rest is None else [(given_.rest, found.rest)])
    summary = json.loads((tmp_path / "cache.json").read_text())["summary"]
    for before, after in pairs:
        gap = np.abs(before - after.astype(np.float32))
        assert gap.max() <= summary["error_max"]
        if bits == 16:
            assert np.array_equal(after, before.astype(np.float16))
    assert summary["error_mean"] < (0.002 if bits == 16 else 0.03)
    assert summary["error_max"] < (0.01 if bits == 16 else 0.1)


@given(
    bits=st.sampled_from([8, 16, 32]),
    vocab_size=st.integers(1, 2**24),
    k=st.integers(1, 20),
    tokens=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=50)
def test_ids_survive_any_vocabulary_and_k(bits: int, vocab_size: int, k: int, tokens: int, seed: int) -> None:
    codec = Codec(id_bits=max(16, (vocab_size - 1).bit_length()), logp_bits=bits)
    signals = made(tokens, k=k, vocab_size=vocab_size, seed=seed)
    decoded = codec.decode(codec.encode(signals))
    assert np.array_equal(decoded.ids, signals.ids)
    assert np.abs(decoded.logp.astype(np.float32) - signals.logp).max() < 0.2


@pytest.mark.parametrize("bits", [32, 16, 8])
def test_impossible_certain_and_slightly_positive_log_probs(bits: int) -> None:
    logp = np.array([[1e-7, -2.0, -np.inf], [0.0, -np.inf, -np.inf]], np.float32)
    signals = Signals(ids=np.arange(6).reshape(2, 3), logp=logp, rest=np.array([-np.inf, -np.inf], np.float32))
    codec = Codec(id_bits=18, logp_bits=bits)
    decoded = codec.decode(codec.encode(signals))
    assert np.array_equal(decoded.logp, [[0.0, -2.0, -np.inf], [0.0, -np.inf, -np.inf]])
    assert decoded.rest is not None and np.isneginf(decoded.rest).all()


def test_rows_are_found_in_any_order_and_across_shards(tmp_path: Path) -> None:
    write_all(tmp_path, META)
    reader = CacheReader(tmp_path)
    rows = [row(index, meta=META) for index in range(10)]
    order = np.random.default_rng(0).permutation(10)
    found = read_rows(reader, np.array([rows[i].sample_id[0] for i in order]))
    for index, signals in zip(order, found, strict=True):
        assert np.array_equal(signals.ids, rows[index].signals.ids)
        assert np.array_equal(signals.logp, rows[index].signals.logp.astype(np.float16))
    # one read of tokens that jump between shards
    tokens = np.random.default_rng(1).permutation(reader.index.summary["tokens"])[:200]
    mixed = reader.read(tokens)
    everything = Signals.joined([block.signals for block in rows])
    assert np.array_equal(mixed.ids, everything.ids[tokens])
    assert mixed.rest is not None and everything.rest is not None
    assert np.array_equal(mixed.rest, everything.rest[tokens].astype(np.float16))


def test_a_sequence_stored_twice_is_right(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, replace(META, dataset_size=3, rows_per_shard=2))
    for shard, rows in enumerate([(0, 1), (0,)]):
        writer.write(shard, [row(index, meta=META) for index in rows])
    first, second = read_rows(CacheReader(tmp_path), np.array([1000, 993]))
    assert np.array_equal(first.ids, row(0, meta=META).signals.ids)
    assert np.array_equal(second.ids, row(1, meta=META).signals.ids)


def refused(directory: Path, *, verify: bool = True) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        CacheReader(directory, verify=verify)
    message = str(error.value)
    assert "\n" not in message and "kdlib" in message
    return message


def edited(directory: Path, **changes: object) -> None:
    path = directory / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_cache_is_refused(tmp_path: Path) -> None:
    assert "cache.json" in refused(tmp_path)


def test_a_damaged_index_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path, META)
    edited(tmp_path, meta={"k": 8})
    assert "damaged" in refused(tmp_path)
    (tmp_path / "cache.json").write_text("{")
    assert "damaged" in refused(tmp_path)


def test_another_format_version_is_refused(tmp_path: Path) -> None:
    write_all(tmp_path, META)
    edited(tmp_path, format_version=99)
    assert "format 99" in refused(tmp_path)


def test_an_unfinished_cache_is_refused(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path, META)
    writer.write(0, [row(index, meta=META) for index in writer.rows(0)])
    assert "unfinished (4 of 10 rows)" in refused(tmp_path)
    write_all(tmp_path, META)
    assert CacheReader(tmp_path).index.complete


def test_a_truncated_file_is_refused_without_a_checksum_and_rewritten(tmp_path: Path) -> None:
    write_all(tmp_path, META)
    whole, path = files(tmp_path), tmp_path / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    assert "truncated" in refused(tmp_path, verify=False)
    path.unlink()
    assert "missing" in refused(tmp_path, verify=False)
    write_all(tmp_path, META)
    assert files(tmp_path) == whole


@pytest.mark.parametrize("where", [12, 5000, -1])
def test_a_flipped_bit_is_refused(tmp_path: Path, where: int) -> None:
    write_all(tmp_path, META)
    path = tmp_path / "shard-000002.safetensors"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert "checksum" in refused(tmp_path)


def test_another_tokenizer_and_another_template_are_refused(tmp_path: Path) -> None:
    write_all(tmp_path, META)
    reader = CacheReader(tmp_path)
    reader.check_fingerprints(tokenizer="tok", template="tem")
    with pytest.raises(ValueError, match=r"another tokenizer \(tok, yours is other\)"):
        reader.check_fingerprints(tokenizer="other", template="tem")
    with pytest.raises(ValueError, match="another chat template"):
        reader.check_fingerprints(tokenizer="tok", template="other")


def test_a_sequence_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_all(tmp_path, META)
    with pytest.raises(ValueError, match=r"1 of 2 samples .* 12345.* `kdlib cache` with the same dataset"):
        CacheReader(tmp_path).locate(np.array([1000, 12345]))


def test_writing_into_another_cache_names_what_changed(tmp_path: Path) -> None:
    write_all(tmp_path, META)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"k: 8 -> 4; temperature: 1.0 -> 2.0"):
        CacheWriter(tmp_path, replace(META, k=4, temperature=2.0))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "dense"}, "topk, sampled or given"),
        ({"kind": "given", "k": 8}, "keeps one log-prob per token"),
        ({"k": 0}, "k=0"),
        ({"k": 2000, "vocab_size": 1000}, "k=2000"),
        ({"logp_bits": 4}, "bits=4"),
        ({"temperature": 0.0}, "temperature"),
        ({"dataset_size": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(META, **changes)


def test_signals_that_do_not_fit_the_cache_are_refused(tmp_path: Path) -> None:
    writer, block = CacheWriter(tmp_path, META), row(0, meta=META)
    for wrong, message in [
        (replace(block, count=np.array([1])), "scored positions"),
        (replace(block, signals=made(90, k=9, vocab_size=100)), "ids a position"),
        (replace(block, signals=made(90, k=8, vocab_size=300000)), "outside the vocabulary"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.write(0, [wrong])


def test_killed_while_writing_and_continued_gives_the_same_bytes(tmp_path: Path) -> None:
    meta = replace(META, k=64, dataset_size=400, rows_per_shard=10)
    write_all(tmp_path / "whole", meta)
    for target in ("shard-000004.safetensors", "shard-000017.safetensors"):
        child = subprocess.Popen(
            [sys.executable, __file__, str(tmp_path / "killed"), repr(meta)],
            env={**os.environ, "PYTHONPATH": str(Path(kdlib.__file__).parents[1])},
        )
        while not (tmp_path / "killed" / target).exists():
            assert child.poll() is None, "the writer ended before it could be killed"
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert "unfinished" in refused(tmp_path / "killed")
    (tmp_path / "killed" / "shard-000039.safetensors.partial").write_bytes(b"half of a shard")
    write_all(tmp_path / "killed", meta)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


if __name__ == "__main__":  # the writer that the last test kills
    write_all(Path(sys.argv[1]), eval(sys.argv[2]), pause=0.03)

"""Trajectories of diffusion models on disk: rows go in and come out, and kinds of shards do not mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kdlib.data import load_rows, sample_id
from kdlib.data.diffusion import (
    DiffusionCollator,
    DiffusionIndex,
    DiffusionWriter,
    DiffusionWritten,
    read_diffusion_trajectories,
    trajectory_row,
)
from kdlib.data.traces import TraceWriter
from kdlib.data.trajectories import TrajectoryIndex, TrajectoryWriter, Written, is_trajectories
from kdlib.tokenizers.identity import tokenizer_fingerprint
from tests.cli.conftest import tree
from tests.tiny import tiny_tokenizer

SETTINGS = {"model": "m", "tokenizer": tokenizer_fingerprint(tiny_tokenizer()), "gen_length": 4, "seed": 0}


def rows_of(prompts: range) -> list[dict[str, Any]]:
    return [
        trajectory_row([i + 3, 9], [i, 5, 2], commit_step=[3, 1, 2], block_length=4, forwards=3 + i % 2)
        for i in prompts
        if i != 4
    ]


def begun(directory: Path, **changes: Any) -> DiffusionWriter:
    options = {"prompts": 7, "rows_per_shard": 3, **{k: changes.pop(k) for k in ("overwrite",) if k in changes}}
    return DiffusionWriter(directory, {**SETTINGS, **changes}, **options)


def write(writer: DiffusionWriter, shards: list[int]) -> None:
    """Writes these shards, and lets another writer begin."""
    for shard in shards:
        rows, count = rows_of(writer.prompts(shard)), len(writer.prompts(shard))
        counts = {"tokens": 2 * len(rows), "attempts": count + 1, "spent": 4 * (count + 1)}
        dropped = {"wrong": count - len(rows)} if len(rows) < count else {}
        writer.write(shard, DiffusionWritten(rows=rows, **counts, kept_at={"attempt 1": len(rows)}, dropped_rows=dropped))
    writer.close()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    writer = begun(tmp_path / "d")
    write(writer, writer.missing)
    return writer.directory


def test_a_finished_directory_is_a_dataset(finished: Path) -> None:
    total = DiffusionIndex.load(finished).summary
    expected = rows_of(range(7))
    forwards = sum(row["forwards"] for row in expected)
    assert (total["prompts"], total["rows"], total["tokens"], total["forwards"]) == (7, 6, 12, forwards)
    assert (total["attempts"], total["spent"], total["kept_at"]) == (10, 40, {"attempt 1": 6})
    assert total["dropped_rows"] == {"wrong": 1} and total["bytes"] == sum(p.stat().st_size for p in finished.glob("*.parquet"))
    assert is_trajectories(finished)
    for rows in (read_diffusion_trajectories(finished, tokenizer=tiny_tokenizer()), load_rows(str(finished))):
        assert [dict(row) for row in rows] == expected
        assert {rows.features[name].feature.dtype for name in ("input_ids", "labels", "commit_step")} == {"int32"}
        assert rows.features["sample_id"].dtype == "int64" and rows.features["prompt_length"].dtype == "int32"
    assert [dict(row) for row in load_rows(str(finished), split="train[1:3]")] == expected[1:3]
    row = expected[0]
    assert row["input_ids"] == [3, 9, 0, 5, 2] and row["labels"] == [-100, -100, 0, 5, 2] and row["prompt_length"] == 2
    assert row["sample_id"] == sample_id(row["input_ids"], row["labels"])


def test_rows_from_disk_become_a_batch(finished: Path) -> None:
    collate = DiffusionCollator(0, eos_token_id=2, eos_padding="block", block_length=4, max_length=64)
    batch = collate(list(load_rows(str(finished), limit=2)))
    assert batch["input_ids"].tolist() == [[3, 9, 0, 5, 2, 2], [4, 9, 1, 5, 2, 2]]
    assert batch["commit_step"].tolist() == [[0, 0, 3, 1, 2, 2]] * 2 and batch["rank"].tolist() == [[-1, -1, 0, 1, 2, 3]] * 2


def test_an_interrupted_writing_goes_on_to_the_same_files(finished: Path, tmp_path: Path) -> None:
    whole = {Path(name).name: content for name, content in tree(finished).items()}
    part = begun(tmp_path / "part")
    write(part, [0, 2])
    with pytest.raises(ValueError, match=r"unfinished \(2 of 3 shards\): run the same `kdlib trajectories diffusion`"):
        load_rows(str(part.directory))
    (part.directory / "shard-00002.parquet").write_bytes(whole["shard-00002.parquet"][:-1])
    again = begun(tmp_path / "part")
    assert again.missing == [1, 2] and "truncated" in again.damaged[2]
    write(again, again.missing)
    assert {Path(name).name: content for name, content in tree(part.directory).items()} == whole


def test_changed_settings_another_tokenizer_and_no_rows_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(gen_length: 4 -> 8; seed: 0 -> 1\).*--overwrite true"):
        begun(finished, gen_length=8, seed=1)
    with pytest.raises(ValueError, match="written with another tokenizer, by m"):
        load_rows(str(finished), tokenizer=tiny_tokenizer(vocab_size=300))
    writer = DiffusionWriter(tmp_path / "none", SETTINGS, prompts=1, rows_per_shard=1)
    writer.write(0, DiffusionWritten(rows=[], tokens=0, attempts=5, spent=20, dropped_rows={"wrong": 1}))
    writer.close()
    with pytest.raises(ValueError, match=r"no row .* was kept: .*wrong"):
        load_rows(str(tmp_path / "none"))


def jacobi(directory: Path, **options: Any) -> TrajectoryWriter:
    return TrajectoryWriter(directory, SETTINGS, prompts=1, rows_per_shard=1, **options)


def traces(directory: Path, **options: Any) -> TraceWriter:
    return TraceWriter(directory, SETTINGS, prompts_per_batch=1, prompts=1, rows_per_shard=1, **options)


def test_kinds_do_not_mix_and_overwriting_leaves_nothing_of_the_other(finished: Path) -> None:
    before = tree(finished)
    for other, command in ((jacobi, "kdlib trajectories jacobi"), (traces, "kdlib generate")):
        with pytest.raises(ValueError, match=f"is not of .* that {command} writes.*--overwrite true"):
            other(finished)
    assert tree(finished) == before
    (finished / "notes.txt").write_text("mine")
    answered = traces(finished, overwrite=True)
    assert {path.name for path in finished.iterdir()} == {"index.json", "notes.txt"}
    answered.finish(0, [])
    answered.close()
    (finished / "correct.jsonl").write_text("")
    with pytest.raises(ValueError, match="is not of diffusion trajectories"):
        begun(finished)
    write(begun(finished, overwrite=True), [0])
    assert {path.name for path in finished.iterdir()} == {"index.json", "notes.txt", "shard-00000.parquet"}
    iterated = jacobi(finished, overwrite=True)
    iterated.write(0, Written(rows=[], tokens=0, iterations=0, forwards=1, block_by_block=1))
    iterated.close()
    assert TrajectoryIndex.load(finished).complete


def test_an_index_of_something_else_names_no_files_to_delete(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text('{"files": ["*"]}')
    (tmp_path / "weights.bin").write_text("dear")
    begun(tmp_path, overwrite=True).close()
    assert (tmp_path / "weights.bin").read_text() == "dear"

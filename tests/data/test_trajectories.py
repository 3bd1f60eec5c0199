"""Trajectories on disk: states go in and come out, stopped runs go on, damage is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlib.data import load_rows, sample_id
from kdlib.data.jacobi import Block
from kdlib.data.trajectories import (
    BlockTrajectory,
    TrajectoryIndex,
    TrajectoryWriter,
    Written,
    block_states,
    encoded_row,
    is_trajectories,
    read_trajectories,
)
from kdlib.tokenizers.identity import tokenizer_fingerprint
from tests.cli.conftest import tree
from tests.tiny import tiny_tokenizer

SETTINGS = {"model": "m", "tokenizer": tokenizer_fingerprint(tiny_tokenizer()), "block_size": 4, "seed": 0}


@st.composite
def trajectories(draw: st.DrawFn) -> tuple[list[int], list[int], int, dict[int, list[list[int]]]]:
    """(prompt, completion, block_size, {block: its states})."""
    token = st.integers(0, 5)  # few, so that states agree with their block in many places
    prompt = draw(st.lists(token, min_size=1, max_size=5))
    completion = draw(st.lists(token, min_size=1, max_size=14))
    n = draw(st.integers(2, 6))
    blocks = {}
    for number, start in enumerate(range(0, len(completion), n)):
        target = completion[start : start + n]
        if draw(st.booleans()):
            state = st.lists(token, min_size=len(target), max_size=len(target))
            blocks[number] = [*draw(st.lists(state, max_size=4)), target]
    return prompt, completion, n, blocks


def row_of(prompt: list[int], completion: list[int], n: int, blocks: dict[int, list[list[int]]]) -> dict[str, Any]:
    made = [BlockTrajectory(number=number, states=np.array(states)) for number, states in blocks.items()]
    return encoded_row(prompt, completion, block_size=n, blocks=made, reference=[9, 9])


def first_mismatch(state: list[int], target: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(state, target, strict=True)) if a != b), len(target))


@given(trajectories())
def test_states_come_out_as_they_went_in(made: tuple[list[int], list[int], int, dict[int, list[list[int]]]]) -> None:
    prompt, completion, n, blocks = made
    row = row_of(*made)
    assert row["input_ids"] == prompt + completion and row["labels"] == [-100] * len(prompt) + completion
    assert row["sample_id"] == sample_id(row["input_ids"], row["labels"])
    assert (row["prompt_length"], row["block_size"], row["block"]) == (len(prompt), n, list(blocks))
    for index, (number, states) in enumerate(blocks.items()):
        decoded = block_states(row, index)
        assert decoded.tolist() == states and decoded.dtype == np.int32
        target = completion[number * n : number * n + n]
        found = Block(number=number, start=0, states=decoded).mismatches(np.array(target))
        assert found.tolist() == [first_mismatch(state, target) for state in states]


def test_only_what_differs_is_stored() -> None:
    row = row_of([7], [1, 2, 3, 4], 4, {0: [[1, 5, 5, 4], [1, 2, 5, 4], [1, 2, 3, 4]]})
    assert row["states"] == [3] and row["changed"] == [2, 1, 0]
    assert row["changed_position"] == [1, 2, 2] and row["changed_token"] == [5, 5, 5]


def rows_of(prompts: range) -> list[dict[str, Any]]:
    return [row_of([i + 1], [i, i + 1, i + 2, 3, 4, 5], 4, {1: [[4, i], [4, 5]]}) for i in prompts]


def begun(directory: Path, **changes: Any) -> TrajectoryWriter:
    options = {"prompts": 7, "rows_per_shard": 3, **{k: changes.pop(k) for k in ("overwrite",) if k in changes}}
    return TrajectoryWriter(directory, {**SETTINGS, **changes}, **options)


def write(writer: TrajectoryWriter, shards: list[int]) -> None:
    """Writes these shards, and lets another writer begin."""
    for shard in shards:
        rows = rows_of(writer.prompts(shard))
        counts = {"tokens": 2 * len(rows), "iterations": 2 * len(rows), "forwards": 2, "block_by_block": 4 * len(rows)}
        writer.write(shard, Written(rows=rows, **counts, dropped_blocks={"other": len(rows)}))
    writer.close()


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    writer = begun(tmp_path / "t")
    write(writer, writer.missing)
    return writer.directory


def test_a_finished_directory_is_a_dataset(finished: Path) -> None:
    index = TrajectoryIndex.load(finished)
    assert index.complete and [shard.rows for shard in index.shards.values()] == [3, 3, 1]
    total = index.summary
    assert (total["rows"], total["blocks"], total["tokens"], total["states"]) == (7, 7, 14, 14)
    assert total["dropped_blocks"] == {"other": 7} and total["dropped_rows"] == {} and total["forwards"] == 6
    assert total["bytes"] == sum(path.stat().st_size for path in finished.glob("*.parquet"))

    expected = rows_of(range(7))
    for rows in (read_trajectories(finished, tokenizer=tiny_tokenizer()), load_rows(str(finished))):
        assert [dict(row) for row in rows] == expected
        assert {str(rows.features[name].feature.dtype) for name in ("input_ids", "states", "changed_token")} == {"int32"}
        assert rows.features["sample_id"].dtype == "int64"
        assert block_states(rows[2], 0).tolist() == [[4, 2], [4, 5]]
    assert [dict(row) for row in load_rows(str(finished), split="train[1:3]")] == expected[1:3]


def test_an_interrupted_writing_goes_on_to_the_same_files(finished: Path, tmp_path: Path) -> None:
    whole = {Path(name).name: content for name, content in tree(finished).items()}
    part = begun(tmp_path / "part")
    write(part, [0, 2])
    with pytest.raises(ValueError, match=r"unfinished \(2 of 3 shards\)"):
        read_trajectories(part.directory)
    (part.directory / "shard-00002.parquet").write_bytes(whole["shard-00002.parquet"][:-1])
    (part.directory / "shard-00001.parquet.partial").write_bytes(b"cut")

    again = begun(tmp_path / "part")
    assert again.missing == [1, 2] and list(again.damaged) == [2] and "truncated" in again.damaged[2]
    write(again, again.missing)
    assert {Path(name).name: content for name, content in tree(part.directory).items()} == whole
    assert begun(tmp_path / "part").missing == []


@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damage_is_named_and_written_again(finished: Path, damage: str) -> None:
    shard = finished / "shard-00001.parquet"
    content = shard.read_bytes()
    changed = {"missing": b"", "truncated": content[:-5], "altered": content[:50] + bytes([content[50] ^ 1]) + content[51:]}
    shard.write_bytes(changed[damage])
    if damage == "missing":
        shard.unlink()
    with pytest.raises(ValueError, match=rf"shard-00001.parquet is {damage}"):
        read_trajectories(finished)
    writer = begun(finished)
    assert writer.missing == [1]
    write(writer, [1])
    assert shard.read_bytes() == content and len(read_trajectories(finished)) == 7


def test_changed_settings_are_named_and_overwriting_starts_anew(finished: Path) -> None:
    before = tree(finished)
    with pytest.raises(ValueError, match=r"\(block_size: 4 -> 8; seed: 0 -> 1; init: null -> last\).*--overwrite true"):
        begun(finished, block_size=8, seed=1, init="last")
    assert tree(finished) == before
    assert begun(finished, seed=1, overwrite=True).missing == [0, 1, 2]
    assert [path.name for path in finished.iterdir()] == ["index.json"]


def test_two_processes_do_not_write_to_one_directory(tmp_path: Path) -> None:
    first = begun(tmp_path)
    with pytest.raises(ValueError, match="another kdlib trajectories jacobi is writing"):
        begun(tmp_path, overwrite=True)
    first.close()
    begun(tmp_path).close()


def test_an_index_that_is_damaged_or_of_another_version_is_refused(finished: Path) -> None:
    index = finished / "index.json"
    whole = index.read_text()
    changes = {
        "has format 2, this kdlib reads 1": whole.replace('"format_version": 1', '"format_version": 2'),
        "is damaged .* --overwrite true": whole[:-10],
        "is damaged .*'settings'": whole.replace('"settings"', '"options"'),
    }
    for message, content in changes.items():
        index.write_text(content)
        with pytest.raises(ValueError, match=message):
            begun(finished)


def test_other_directories_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "traces").mkdir()
    (tmp_path / "traces" / "index.json").write_text('{"format_version": 1, "shards": {}}')
    before = tree(tmp_path)
    for directory, message in ((tmp_path, "holds no trajectories"), (tmp_path / "traces", "is not of trajectories")):
        assert not is_trajectories(directory)
        with pytest.raises(ValueError, match=message):
            begun(directory)
    with pytest.raises(ValueError, match="is a file"):
        begun(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="kdlib trajectories jacobi"):
        read_trajectories(tmp_path / "nowhere")
    assert tree(tmp_path) == before


def test_another_tokenizer_and_no_rows_at_all_are_refused(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="written with another tokenizer, by m"):
        read_trajectories(finished, tokenizer=tiny_tokenizer(vocab_size=300))
    empty = TrajectoryWriter(tmp_path / "empty", SETTINGS, prompts=1, rows_per_shard=1)
    empty.write(0, Written(rows=[], tokens=0, iterations=0, forwards=1, block_by_block=4, dropped_rows={"no block left": 1}))
    empty.close()
    with pytest.raises(ValueError, match=r"no row .* was kept: .*no block left"):
        read_trajectories(tmp_path / "empty")

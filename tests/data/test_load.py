"""Datasets by name, and the one line a user reads when a name is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from kdlib.data import load_rows

ROWS = [{"text": "two"}, {"text": "four"}, {"text": "six"}]


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet", ".txt"])
def test_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    rows = Dataset.from_list(ROWS)
    {
        ".jsonl": lambda: write_jsonl(path, ROWS),
        ".json": lambda: path.write_text(json.dumps(ROWS, indent=1)),
        ".csv": lambda: rows.to_csv(path),
        ".parquet": lambda: rows.to_parquet(path),
        ".txt": lambda: path.write_text("two\nfour\nsix\n"),
    }[suffix]()
    assert list(load_rows(str(path))) == ROWS
    assert list(load_rows(str(path), split="train[:2]")) == ROWS[:2]


def test_a_glob_reads_its_files_in_order_and_skips_empty_ones(tmp_path: Path) -> None:
    for name, rows in (("b", ROWS[1:]), ("a", ROWS[:1]), ("c", [])):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert list(load_rows(f"{tmp_path}/*.jsonl")) == ROWS


def test_a_file_name_with_glob_characters(tmp_path: Path) -> None:
    assert list(load_rows(str(write_jsonl(tmp_path / "rows[1].jsonl", ROWS)))) == ROWS


def test_saved_datasets(tmp_path: Path) -> None:
    rows = Dataset.from_list(ROWS)
    rows.save_to_disk(tmp_path / "plain")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    assert list(load_rows(str(tmp_path / "plain"))) == ROWS
    assert list(load_rows(str(tmp_path / "splits"), split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match="has no split validation: choose one of train, test"):
        load_rows(str(tmp_path / "splits"), split="validation")
    with pytest.raises(ValueError, match="saved without splits"):
        load_rows(str(tmp_path / "plain"), split="test")


def test_messages_with_different_keys_keep_them(tmp_path: Path) -> None:
    calls = [
        {"messages": [{"role": "assistant", "tool_calls": [{"a": {"x": 1}}]}]},
        {"messages": [{"role": "user"}]},
    ]
    assert load_rows(str(write_jsonl(tmp_path / "rows.jsonl", calls)))[1]["messages"][0]["role"] == "user"


@pytest.mark.parametrize(
    "name",
    [
        "missing.jsonl",
        "./missing",
        "/no/such/dir",
        "~/no-such-dir/x",
        "a/b/c",
        "no-dir/*.jsonl",
        "data/x.csv",
    ],
)
def test_a_path_that_does_not_exist_is_not_looked_up(name: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"(does not exist|no file matches).*looked from") as error:
        load_rows(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["nobody/nothing", "nothing"])
def test_a_hub_name_without_a_network_is_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=f"dataset {name} is no file or directory here .*Hub") as error:
        load_rows(name)
    assert "\n" not in str(error.value)


BROKEN = {
    "bad.jsonl": ('{"a": 1}\n{"a": 2\n{"a": 3}\n', "bad.jsonl line 2 is not a JSON row: Expecting"),
    "list.jsonl": ('{"a": 1}\n3\n', "list.jsonl line 2 is not a JSON row: a row is an object"),
    "bad.json": ('[{"a": 1},\n{"a": 2]\n', "bad.json cannot be read"),
    "bad.parquet": ("no parquet", "bad.parquet cannot be read"),
    "empty.jsonl": ("", "empty.jsonl is empty"),
    "blank.jsonl": ("\n\n", "blank.jsonl is empty"),
    "rows.xml": ("<a/>", "files end in .xml: give files of one of .jsonl"),
    "head.csv": ("a,b\n", "is empty"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(tmp_path: Path, name: str) -> None:
    content, message = BROKEN[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_rows(str(tmp_path / name))
    assert "\n" not in str(error.value)


def test_a_directory_that_was_not_saved(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"was not written by save_to_disk: name its files, such as '.*/\*.jsonl'"):
        load_rows(str(tmp_path))


def test_an_unknown_split_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'rows.jsonl cannot be read: Unknown split "test"'):
        load_rows(str(write_jsonl(tmp_path / "rows.jsonl", ROWS)), split="test")

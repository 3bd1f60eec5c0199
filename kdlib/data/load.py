"""A dataset by name: files, a glob, a directory written by ``save_to_disk``, or a Hub id."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError

from kdlib.data.diffusion import read_diffusion_trajectories
from kdlib.data.shards import kind_of
from kdlib.data.trajectories import read_trajectories
from kdlib.data.trajectories.table import DIFFUSION, JACOBI

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TRAJECTORIES = {JACOBI: read_trajectories, DIFFUSION: read_diffusion_trajectories}
_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_FAILURES = (
    OSError,
    ValueError,
    RuntimeError,
    DatasetsError,
)  # what `datasets` raises for bad files, names and networks


def load_rows(
    dataset_name: str,
    *,
    split: str = "train",
    config: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
) -> Dataset:
    """The rows of ``dataset_name``: .jsonl, .json, .csv, .parquet or .txt (a row per line), a glob of them, a
    saved directory, one of ``kdlib trajectories``, or a Hub id.

    Files form the split "train"; ``split`` may slice it ("train[:100]"). ``config`` names a Hub dataset's
    configuration; ``tokenizer`` is the one that trajectories have to be of; ``limit`` keeps the first rows.
    Raises FileNotFoundError for a path that does not exist and ValueError for what cannot be read or has no rows, in one line.
    """
    path = Path(dataset_name).expanduser()
    if (read := _TRAJECTORIES.get(kind_of(path) or "")) is not None:
        rows = read(path, tokenizer=tokenizer, split=split)
    elif path.is_dir():
        rows = _saved(path, split)
    elif path.is_file():
        rows = _files([path], split)
    elif glob.has_magic(dataset_name):
        rows = _files(_matches(str(path)), split)
    elif path.suffix in _BUILDERS or not _HUB_ID.fullmatch(dataset_name):
        raise FileNotFoundError(f"dataset {dataset_name} does not exist: check the path (looked from {Path.cwd()})")
    else:
        rows = _from_hub(dataset_name, split, config)
    if len(rows) == 0:
        raise ValueError(f"dataset {dataset_name} ({split}) is empty: nothing to train on")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _matches(pattern: str) -> list[Path]:
    found = [Path(name) for name in sorted(glob.glob(pattern, recursive=True)) if Path(name).is_file()]
    if not found:
        raise FileNotFoundError(f"no file matches {pattern}: check the pattern (looked from {Path.cwd()})")
    return found


def _files(paths: Sequence[Path], split: str) -> Dataset:
    suffixes = {path.suffix for path in paths}
    unknown = suffixes - _BUILDERS.keys()
    if unknown or len({_BUILDERS[suffix] for suffix in suffixes}) > 1:
        raise ValueError(f"dataset files end in {', '.join(sorted(suffixes))}: give files of one of {', '.join(_BUILDERS)}")
    filled = [path for path in paths if path.stat().st_size > 0]
    if not filled:
        raise ValueError(f"dataset {paths[0]} is empty: nothing to train on")
    builder = _BUILDERS[filled[0].suffix]
    options: dict[str, Any] = {"parse_agent_traces": False} if builder == "json" else {}
    try:
        return load_dataset(builder, data_files=[glob.escape(str(path)) for path in filled], split=split, **options)
    except _FAILURES as error:
        if "corresponds to no data" in str(error):
            raise ValueError(f"dataset {filled[0]} is empty: nothing to train on") from error
        if builder == "json":
            for path in filled:
                _check_json(path)
        raise ValueError(f"dataset {filled[0]} cannot be read: {_one_line(error)}") from error


def _check_json(path: Path) -> None:
    """Raise a ValueError that names the place where a JSON file is broken."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if line.lstrip().startswith("[") or path.suffix == ".json":
                return  # one value over several lines: the reader's own message has to do
            try:
                valid = not line.strip() or isinstance(json.loads(line), dict)
                problem = "a row is an object, {...}"
            except json.JSONDecodeError as error:
                valid, problem = False, str(error)
            if not valid:
                raise ValueError(f"{path} line {number} is not a JSON row: {problem}; fix or remove that line")


def _saved(path: Path, split: str) -> Dataset:
    if not (path / "dataset_dict.json").is_file() and not (path / "dataset_info.json").is_file():
        raise ValueError(f"directory {path} was not written by save_to_disk: name its files, such as '{path}/*.jsonl'")
    try:
        saved = load_from_disk(path)
    except _FAILURES as error:
        raise ValueError(f"dataset {path} cannot be read: {_one_line(error)}") from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise ValueError(f"dataset {path} has no split {split}: choose one of {', '.join(saved)}")
        return saved[split]
    if split != "train":
        raise ValueError(f"dataset {path} was saved without splits: it cannot give {split}, leave the split at train")
    return saved


def _from_hub(name: str, split: str, config: str | None) -> Dataset:
    try:
        return load_dataset(name, config, split=split)
    except _FAILURES as error:
        raise ValueError(
            f"dataset {name} is no file or directory here and did not load from the Hub: {_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    """The innermost message, which is the one that says what is wrong, without line breaks."""
    while error.__cause__ is not None:
        error = error.__cause__
    words = " ".join(str(error).split())
    return words if len(words) <= 300 else words[:297] + "..."

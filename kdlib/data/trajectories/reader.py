"""Reading trajectories: every shard checked, then one Dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset, load_dataset

from kdlib.data.trajectories.index import TrajectoryIndex
from kdlib.tokenizers.identity import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_trajectories(
    directory: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, split: str = "train"
) -> Dataset:
    """The rows of a finished directory, columns as ``codec.encoded_row`` makes them; ``split`` may be a slice, "train[:100]".

    Raises FileNotFoundError where there are none; ValueError for what is unfinished, truncated or altered, for no rows at all,
    and when ``tokenizer`` is not the one they were written with.
    """
    directory = Path(directory)
    index = TrajectoryIndex.load(directory)
    index.check(directory)
    if tokenizer is not None and tokenizer_fingerprint(tokenizer) != index.settings["tokenizer"]:
        raise ValueError(
            f"the trajectories in {directory} were written with another tokenizer, by {index.settings['model']}: "
            "train that model, or write trajectories with yours"
        )
    if not index.summary["rows"]:
        raise ValueError(f"no row of the trajectories in {directory} was kept: {index.summary['dropped_rows']}")
    files = [str(directory / shard.file) for shard in index.shards.values() if shard.rows]
    found: Dataset = load_dataset("parquet", data_files=files, split=split)
    return found

"""Reading Jacobi trajectories: every shard checked, then one Dataset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from datasets import Dataset

from kdlib.data.trajectories.index import TrajectoryIndex
from kdlib.data.trajectories.table import read_table

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_trajectories(
    directory: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, split: str = "train"
) -> Dataset:
    """The rows of a finished directory, columns as ``codec.encoded_row`` makes them; options and errors: ``read_table``."""
    return read_table(TrajectoryIndex, directory, tokenizer=tokenizer, split=split)

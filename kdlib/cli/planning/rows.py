"""The rows of a plan: those that take most, and stand-ins where the data are not there yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from kdlib.cli.planning.known import WORD
from kdlib.data.draft import UNSCORED
from kdlib.data.rollout_rows import prompt_ids, with_completion

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Assumed:
    """Rows that are only assumed: how many, and the tokens of each (of its prompt, where all completions are drawn)."""

    rows: int
    tokens_per_row: int

    def dataset(self, args: Any, *, count: int) -> Dataset:
        """``count`` rows of that length, all scored; prompts with nothing scored where completions are drawn."""
        length = min(self.tokens_per_row, args.max_length)
        labels = [UNSCORED] * length if args.on_policy_fraction == 1.0 else [1] * length
        row = {"input_ids": [1] * length, "labels": labels, "commit_step": list(range(length))}
        return Dataset.from_list([{**row, "sample_id": number} for number in range(count)])

    def texts(self, *, count: int) -> Dataset:
        """``count`` rows of as many words that are a token each, for two tokenizers to read."""
        row = {"prompt": WORD, "completion": WORD * (self.tokens_per_row - 1)}
        return Dataset.from_list([row] * count)


def longest_rows(trainer: Any, count: int) -> list[Row]:
    """The ``count`` longest training rows, with completions of the greatest length where those are drawn."""
    dataset = trainer.train_rows.dataset
    batches = dataset.with_format("arrow").iter(batch_size=4096)
    lengths = np.concatenate([pc.list_value_length(batch["input_ids"]).to_numpy() for batch in batches])
    rows = [dataset[int(index)] for index in np.argsort(-lengths, kind="stable")[:count]]
    return rows if trainer.on_policy is None else [_completed(row, trainer) for row in rows]


def _completed(row: Row, trainer: Any) -> Row:
    """The row with a drawn completion, where that makes it longer."""
    prompt = len(prompt_ids(row))
    room = min(trainer.args.max_completion_length, trainer.on_policy.rollouts.context - prompt)
    drawn = with_completion(row, [trainer.processing_class.pad_token_id] * max(1, room))
    return drawn if len(drawn["input_ids"]) > len(row["input_ids"]) or not _scored(row) else row


def _scored(row: Row) -> bool:
    return any(label != UNSCORED for label in row["labels"])

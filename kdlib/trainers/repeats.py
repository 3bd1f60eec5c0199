"""Rows that stand in a data set several times, once for each completion drawn for them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

Row = dict[str, Any]


class RepeatedRows(Dataset[Row]):
    """Row i is row i // times with ``generation`` i % times, which is part of the key of its draw."""

    def __init__(self, rows: Any, *, times: int) -> None:
        self.rows, self.times = rows, times

    def __len__(self) -> int:
        return len(self.rows) * self.times

    def __getitem__(self, index: int) -> Row:
        return {**self.rows[index // self.times], "generation": index % self.times}


class RepeatSampler(Sampler[int]):
    """Prompts in an order of their own for each epoch, all generations of one together: engines compute its prefix once."""

    def __init__(self, total: int, *, times: int, seed: int) -> None:
        self.total, self.times, self.seed, self.epoch = total, times, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        for prompt in torch.randperm(self.total // self.times, generator=generator).tolist():
            yield from range(prompt * self.times, (prompt + 1) * self.times)


def as_rows(rows: list[Row]) -> dict[str, list[Row]]:
    """The collator of rows that are collated later, after their rollouts."""
    return {"rows": rows}


def repeated(row: Row) -> Row:
    """A row that only fills a batch: it is neither drawn nor scored."""
    return {**row, "labels": [-100] * len(row["labels"]), "repeated": True}

"""Rows chosen step by step: the loader hands out places, and what stands in a step's places follows from seed and step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch.utils.data import Dataset as TorchDataset

from kdlib.data import Prepared, prepare_dataset
from kdlib.trainers import setup
from kdlib.trainers.config import DistillationConfig

Row = dict[str, Any]
State = dict[str, Any]


class RowChooser:
    """Says which rows a step trains on; ``state`` is saved in checkpoints, ``metrics`` are logged."""

    def begin(self, trainer: Any, saved: State | None) -> None:
        """Before the first step: fresh, or as a checkpoint left it."""
        return

    def rows(self, step: int, count: int) -> list[int]:
        """The rows in the ``count`` places of ``step`` (1-based), of all processes; asked once a step, in order."""
        raise NotImplementedError

    def after_step(self, trainer: Any, step: int) -> None:
        """Once per optimizer step."""
        return

    @property
    def count(self) -> int:
        """How many rows it chooses from: those of an epoch."""
        raise NotImplementedError

    @property
    def state(self) -> State:
        return {}

    @property
    def metrics(self) -> dict[str, float]:
        return {}


class StepRows:
    """The rows of ``dataset`` in the places that a loader hands out, an epoch's from 0 on, in order.

    An epoch has as many places as there are rows to choose from, ``times`` each; ``per_step`` of them, over all processes and
    micro-batches, are an optimizer step's. A row stands in ``times`` places that follow one another, told apart by
    ``generation``.
    """

    def __init__(self, dataset: Dataset, chooser: RowChooser, *, per_step: int, times: int) -> None:
        self.dataset, self.chooser = dataset, chooser
        self.per_step, self.times, self.places = per_step, times, chooser.count * times
        self._step, self._chosen = 0, list[int]()

    def begin(self, trainer: Any, saved: State | None) -> None:
        """Before the first step of a run, which may be resumed."""
        self._step = trainer.state.global_step
        self.chooser.begin(trainer, saved)

    def advance(self) -> None:
        """To the next step: on every process, also on one that has no place in it."""
        self._step += 1
        before = (self._step - 1) % -(-self.places // self.per_step) * self.per_step
        count = min(self.per_step, self.places - before)
        self._chosen = self.chooser.rows(self._step, -(-count // self.times))

    def at(self, places: Sequence[Row]) -> list[Row]:
        """What stands in these places of the step; those that only fill an epoch's last batches get a row of it too."""
        return [self._row(place["place"] % self.per_step) for place in places]

    def _row(self, offset: int) -> Row:
        row = self.dataset[self._chosen[offset // self.times % len(self._chosen)]]
        return {**row, "generation": offset % self.times} if self.times > 1 else row


class Places(TorchDataset[Row]):
    """The places of an epoch, for a loader."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Row:
        return {"place": place}


def prepared_with_columns(rows: Any, tokenizer: Any, args: DistillationConfig, *, columns: Sequence[str]) -> Prepared | None:
    """Training rows with ``columns`` of their source beside the tokens; ValueError for rows without them."""
    if rows is None or isinstance(rows, Prepared):
        return rows
    found = setup.opened(rows)
    check_columns(found, columns)
    if {"input_ids", "labels", "sample_id"} <= set(found.column_names):
        return setup.prepared(found, tokenizer, args, packing=False, training=True)
    made = prepare_dataset(found, tokenizer, keep_source=True, **setup.preparation(args, training=True))
    source, dataset = made.dataset["source"][:], made.dataset.remove_columns("source")
    for name in set(columns) - set(dataset.column_names):  # a row's teacher may be its domain too
        values = found[name][:]
        dataset = dataset.add_column(name, [values[i] for i in source])
    return replace(made, dataset=dataset)


def check_columns(rows: Dataset, columns: Sequence[str]) -> None:
    """ValueError for rows without one of the columns by which they are to be chosen, or without a value in it."""
    for name in columns:
        if name not in rows.column_names:
            raise ValueError(
                f"the rows have no column {name} to be chosen by, only {', '.join(sorted(rows.column_names))}: "
                "name another (curriculum, domain_column) or add it; correct.jsonl of kdlib generate has difficulty"
            )
        if any(value is None for value in rows[name][:]):
            raise ValueError(f"the column {name} is empty in some rows: fill it in, or leave these rows out")

"""Several teachers, each for its own rows: the ``teacher`` column of a row names the one that is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from kdlib.serving import BadRowsError
from kdlib.teachers.cache import CachedTeacher
from kdlib.teachers.composed import RoutedSignal, in_order
from kdlib.types import Positions, Support, Teacher, TeacherSignal


class RoutedTeacher:
    """``teachers`` {name: teacher}; each is called with the lines of a batch that hold rows of its own, and with no others.

    All must give the same kind of signal: whole distributions (of models with heads of their own), or log-probs of equally many
    ids captured at one temperature. Raises ValueError where they do not.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        if not teachers:
            raise ValueError("RoutedTeacher needs teachers: give {name: teacher}")
        self.teachers = dict(teachers)
        kinds = {name: teacher.provides for name, teacher in teachers.items()}
        if len(set(kinds.values())) > 1:
            raise ValueError(
                "the teachers of a routed run must give the same kind of signal, not "
                + ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
            )

    @property
    def provides(self) -> Support:
        return next(iter(self.teachers.values())).provides

    def check_rows(self, dataset: Dataset, *, what: str) -> None:
        """Raises ValueError when prepared rows name no known teacher, or a cache among the teachers lacks rows of its own."""
        if "teacher" not in dataset.column_names:
            raise ValueError(f"the {what} rows name no teacher: add a `teacher` column with one of {self._known}")
        names, ids = dataset["teacher"][:], dataset["sample_id"][:]
        if "seq_lengths" in dataset.column_names:
            names, ids = list(chain.from_iterable(names)), list(chain.from_iterable(ids))
        self._check(names)
        for name, teacher in self.teachers.items():
            own = [sample for sample, of in zip(ids, names, strict=True) if of == name]
            if isinstance(teacher, CachedTeacher) and own:
                teacher.check_rows(Dataset.from_dict({"sample_id": own}), what=f"{what} {name}")

    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        """The signals of all rows in the order of ``positions``; ``batch["teacher"]`` names one per entry of ``sample_id``.

        Raises ValueError for unknown names, for ``layers``, and for signals that cannot be put together; BadRowsError, with
        the signal of all other rows, when some teachers' answers are unusable.
        """
        if layers:
            raise ValueError("routed teachers have no hidden layers in common: an objective on layers needs a single teacher")
        if "teacher" not in batch:
            raise ValueError(f"the rows name no teacher: add a `teacher` column with one of {self._known}")
        self._check(batch["teacher"])
        asked = sorted(set(batch["teacher"]))
        if len(asked) == 1:
            return self.teachers[asked[0]].signal(batch, positions)
        of_sample = torch.tensor([asked.index(name) for name in batch["teacher"]])
        route = of_sample[positions.sequence.cpu()]
        signals: dict[str, TeacherSignal] = {}
        keep, bad = torch.ones(len(route), dtype=torch.bool), []
        for i, name in enumerate(asked):
            try:
                signals[name] = self.teachers[name].signal(*_share(batch, positions, samples=of_sample == i))
            except BadRowsError as error:
                keep[route == i] = error.keep
                bad.append(error)
                if error.signal is not None:
                    signals[name] = error.signal
        numbers = torch.tensor([list(signals).index(name) if name in signals else -1 for name in asked])
        found = _together(signals, numbers[route[keep]]) if signals else None
        if bad or found is None:
            samples = [sample for error in bad for sample in error.samples]
            raise BadRowsError(keep=keep, signal=found, samples=samples, reason=bad[0].reason)
        return found

    @property
    def _known(self) -> str:
        return ", ".join(self.teachers)

    def _check(self, names: Sequence[str | None]) -> None:
        for name in set(names) - self.teachers.keys():
            said = "a row without a teacher" if name is None else f"a row names the teacher {name!r}"
            raise ValueError(f"{said}: its `teacher` must be one of {self._known}")


def _share(batch: Mapping[str, Any], positions: Positions, *, samples: Tensor) -> tuple[dict[str, Any], Positions]:
    """The batch and the positions of some ``samples`` [entries of sample_id], which are numbered anew.

    Lines stay whole; the tokens of others' samples on a packed line belong to the ``sequence`` -1.
    """
    device = positions.index.device
    number = torch.where(samples, samples.cumsum(0) - 1, -1)
    sequence = number.to(batch["sequence"].device)[batch["sequence"]]
    lines = (sequence >= 0).any(-1)
    own = positions.kept(samples.to(device)[positions.sequence])
    line_number = (lines.cumsum(0) - 1).to(device)

    def moved(index: Tensor, width: int) -> Tensor:
        return line_number[index // width] * width + index % width

    of_teacher = own.teacher_index
    share = {name: x[lines.to(x.device)] if isinstance(x, Tensor) and x.ndim > 1 else x for name, x in batch.items()}
    share["sequence"] = sequence[lines]
    share["sample_id"] = batch["sample_id"][samples.to(batch["sample_id"].device)]
    share["teacher"] = [name for name, mine in zip(batch["teacher"], samples.tolist(), strict=True) if mine]
    return share, replace(
        own,
        index=moved(own.index, batch["input_ids"].shape[1]),
        sequence=number.to(device)[own.sequence],
        teacher_index=None if of_teacher is None else moved(of_teacher, batch["teacher_input_ids"].shape[1]),
    )


def _together(signals: Mapping[str, TeacherSignal], route: Tensor) -> TeacherSignal:
    """One signal whose row i is the next row of the ``route[i]``-th."""
    _check_alike(signals, "kinds of signal", [signal.support for signal in signals.values()])
    members = tuple(signals.values())
    if members[0].support is Support.FULL:
        return RoutedSignal(members=members, route=route)
    _check_alike(signals, "temperatures", [signal.temperature for signal in members])
    found = [signal.at(slice(None), signal.temperature) for signal in members]
    _check_alike(signals, "numbers of ids", [part.logp.shape[-1] for part in found])
    order = in_order(route).to(found[0].logp.device)
    return TeacherSignal(
        logp=torch.cat([part.logp for part in found])[order],
        ids=torch.cat([part.ids for part in found if part.ids is not None])[order],
        rest=torch.cat([part.rest for part in found])[order] if members[0].support is Support.TOPK else None,
        support=members[0].support,
        temperature=members[0].temperature,
    )


def _check_alike(signals: Mapping[str, TeacherSignal], what: str, values: Sequence[object]) -> None:
    if len(set(values)) > 1:
        told = ", ".join(f"{name}: {value}" for name, value in zip(signals, values, strict=True))
        raise ValueError(f"the teachers of a batch give different {what} ({told}): set them alike")

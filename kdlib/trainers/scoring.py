"""Asking the teacher: one batch at a time, or all of a step's at once when it is served."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kdlib.serving import BadRowsError
from kdlib.teachers import SelfTeacher, VLLMTeacher, leaves
from kdlib.types import Objective, Positions, Teacher, TeacherSignal

logger = logging.getLogger("kdlib.teacher")

Batch = dict[str, Any]
Signals = dict[str, TeacherSignal | None]


def of_terms(teacher: Teacher, batch: Batch, where: Mapping[str, Positions]) -> dict[str, TeacherSignal]:
    """The signal of each term, as hidden states, from one pass of the teacher for all of them."""
    names = ("index", "labels", "sequence", "teacher_index")
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in where.values()]) for name in names}
    every = teacher.signal(batch, Positions(**joined))
    assert every.hidden is not None
    parts = every.hidden.split([len(positions) for positions in where.values()])
    return {name: replace(every, hidden=rows) for name, rows in zip(where, parts, strict=True)}


class TeacherSignals:
    """The signals of ``teacher`` for every term of a batch; none where the objective asks for none.

    served: a server or engine answers, so that a step's batches are asked for together and before its first forward pass.
    inside_forward: the teacher is the student, to be run where the wrapper's hooks are.
    """

    def __init__(
        self, teacher: Teacher | None, objective: Objective, *, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self.teacher, self.objective, self._autocast = teacher, objective, autocast
        members = leaves(teacher)
        self.served = any(isinstance(member, VLLMTeacher) for member in members)
        self.inside_forward = any(isinstance(member, SelfTeacher) and member.inside_forward for member in members)
        self._bad: list[int] = []

    def __call__(self, batch: Batch) -> Signals:
        """The signal for every term's positions; BadRowsError when a served teacher has none for some."""
        if self.teacher is None or self.objective.accepts is None:
            return dict.fromkeys(batch["positions"])
        with self._autocast():
            return {
                name: self.teacher.signal(batch, where, self.objective.layers) for name, where in batch["positions"].items()
            }

    def all_of(self, batches: list[Batch]) -> list[Batch]:
        """The batches with ``signals``, asked for at the same time; rows that the teacher cannot score are left out."""
        missing = [batch for batch in batches if "signals" not in batch]
        with ThreadPoolExecutor(max_workers=max(1, len(missing))) as pool:
            scored = iter(list(pool.map(self._scored, missing)))
        return [batch if "signals" in batch else next(scored) for batch in batches]

    def _scored(self, batch: Batch) -> Batch:
        positions: dict[str, Positions] = dict(batch["positions"])
        found: Signals = dict.fromkeys(positions)
        for name, where in batch["positions"].items():
            try:
                found |= self({**batch, "positions": {name: where}})
            except BadRowsError as error:
                logger.warning("%s", error)
                self._bad.append(len(error.samples))
                positions[name], found[name] = where.kept(error.keep), error.signal
        return {**batch, "positions": positions, "signals": found}

    def bad_rows(self) -> dict[str, tuple[Tensor, int]]:
        """{"teacher/bad_rows": (rows left out, 1)} since the last call, where there were any."""
        bad, self._bad = self._bad, []
        return {"teacher/bad_rows": (torch.tensor(float(sum(bad))), 1)} if bad else {}

"""Several teachers as one: a weighted mixture of their distributions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdlib.serving import BadRowsError
from kdlib.teachers.composed import MixtureSignal
from kdlib.types import Positions, Support, Teacher, TeacherSignal


class EnsembleTeacher:
    """p = sum_m w_m p_m: probabilities are mixed, not logits; at a temperature each member is tempered first.

    weights: one per teacher, normalised to sum to 1; equal ones by default. Members with padded vocabularies are cut to the
    smallest before their softmax.
    Raises ValueError for weights that do not fit and for teachers that give less than whole distributions, of which no mixture
    can be made.
    """

    provides = Support.FULL

    def __init__(self, teachers: Sequence[Teacher], *, weights: Sequence[float] | None = None) -> None:
        if not teachers:
            raise ValueError("EnsembleTeacher needs teachers: give a list of them")
        weights = [1.0] * len(teachers) if weights is None else weights
        if len(weights) != len(teachers):
            raise ValueError(f"EnsembleTeacher has {len(teachers)} teachers and {len(weights)} weights: give one for each")
        if any(not 0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
            raise ValueError(f"EnsembleTeacher.weights are {list(weights)}: give numbers of 0 or more, not all 0")
        for teacher in teachers:
            if Support.FULL not in teacher.provides:
                raise ValueError(
                    f"EnsembleTeacher mixes whole distributions, {type(teacher).__name__} gives {teacher.provides}: "
                    "use models, or a served teacher with signal hidden"
                )
        self.teachers, total = tuple(teachers), sum(weights)
        self.weights = tuple(weight / total for weight in weights)

    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        """The mixture at the positions; every teacher is called with the whole batch.

        Raises ValueError for ``layers``; BadRowsError, with the mixture of the other rows, when a teacher has none for some.
        """
        if layers:
            raise ValueError("an ensemble has no hidden layers of its own: an objective on layers needs a single teacher")
        try:
            members = tuple(teacher.signal(batch, positions) for teacher in self.teachers)
        except BadRowsError as error:
            raise self._without(batch, positions, error) from error
        log_weights = tuple(math.log(weight) if weight > 0 else -math.inf for weight in self.weights)
        return MixtureSignal(members=members, log_weights=log_weights)

    def _without(self, batch: Mapping[str, Any], positions: Positions, error: BadRowsError) -> BadRowsError:
        """The error with what all teachers say about the rows that one of them could answer."""
        keep, samples, signal = error.keep.clone(), list(error.samples), None
        if keep.any():
            try:
                signal = self.signal(batch, positions.kept(keep))
            except BadRowsError as more:
                keep[keep.nonzero()[:, 0]] = more.keep
                samples, signal = [*samples, *more.samples], more.signal
        return BadRowsError(keep=keep, signal=signal, samples=samples, reason=error.reason)

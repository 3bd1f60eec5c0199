"""Asking a teacher about rows in its own tokens."""

from __future__ import annotations

import logging
from dataclasses import replace

from kdlib.objectives.cross import CrossTokenizerObjective
from kdlib.serving import BadRowsError
from kdlib.trainers.aligned_positions import without_sequences
from kdlib.trainers.scoring import Batch, Signals, TeacherSignals
from kdlib.types import Positions

logger = logging.getLogger("kdlib.teacher")


class AlignedSignals(TeacherSignals):
    """The teacher's signal of the term "distill", at the positions ``other``: the teacher sees an ordinary batch of its own."""

    objective: CrossTokenizerObjective

    def __call__(self, batch: Batch) -> Signals:
        """The signal; BadRowsError when a served teacher has none for some rows."""
        where: Positions = batch["positions"]["distill"]
        assert where.other is not None
        return super().__call__({**batch["other"], "positions": {"distill": replace(where.other, chunk=None)}})

    def _scored(self, batch: Batch) -> Batch:
        try:
            return {**batch, "signals": self(batch)}
        except BadRowsError as error:
            logger.warning("%s", error)
            self._bad.append(len(error.samples))
            where: Positions = batch["positions"]["distill"]
            assert where.other is not None
            bad = where.other.sequence[~error.keep.to(where.other.sequence.device)].unique()
            left = without_sequences(where, bad)
            left = replace(left, total=self.objective.total(left))
            shared = {name: left for name, of_term in batch["positions"].items() if of_term is where}
            return {**batch, "positions": {**batch["positions"], **shared}, "signals": {"distill": error.signal}}

"""The options that say which rows a step trains on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass
class RowsConfig:
    """Which rows a step trains on.

    Args:
        max_pairs: of REDI, pairs made of the answers to one prompt, at most.
        unpaired: of REDI, a prompt with right answers alone: drop leaves it out, positives trains on them without a wrong one.
        curriculum: the column by which rows go from easy (small) to hard (large), such as the difficulty that kdlib generate
            writes; left out, all rows are open from the first step on.
        curriculum_start: with curriculum, the share of the rows, the easiest, that are open at the first step.
        curriculum_end: with curriculum, the share of the run's steps after which all rows are open.
        domain_column: the column that names each row's domain; domains in which the student is further behind the teacher are
            then drawn more often (DDK). Left out, domains are drawn as often as they are there.
        domain_steps: with domain_column, every how many steps the gaps are measured.
        domain_rows: with domain_column, rows of each domain that are measured, and not trained on.
        domain_smoothing: with domain_column, how much of a weight follows the gaps; the rest is the same for all domains.
        on_policy_minimum: the share of rows to which on_policy_fraction falls while the student's entropy does; left out, it
            stays as it is.
    """

    max_pairs: int = 1
    unpaired: Literal["drop", "positives"] = "drop"
    curriculum: str | None = None
    curriculum_start: float = 0.2
    curriculum_end: float = 0.5
    domain_column: str | None = None
    domain_steps: int = 1000
    domain_rows: int = 32
    domain_smoothing: float = 0.5
    on_policy_minimum: float | None = None

    def refuse_rows(self, *, packing: bool, on_policy_fraction: float) -> None:
        """ValueError for values that make no sense, alone or with the other options."""
        for name in ("max_pairs", "domain_steps", "domain_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.unpaired not in ("drop", "positives"):
            raise ValueError(f"unpaired is drop or positives, not {self.unpaired}")
        if not 0.0 < self.curriculum_start <= 1.0 or not 0.0 <= self.curriculum_end <= 1.0:
            raise ValueError("curriculum_start is a share above 0 and at most 1, curriculum_end one from 0 to 1")
        if not 0.0 <= self.domain_smoothing <= 1.0:
            raise ValueError(f"domain_smoothing is a share from 0 to 1, not {self.domain_smoothing}")
        self._refuse_together(packing=packing)
        low = self.on_policy_minimum
        if low is not None and not 0.0 < low <= on_policy_fraction < 1.0:
            raise ValueError(
                f"on_policy_minimum {low} needs 0 < on_policy_minimum <= on_policy_fraction < 1: "
                "at 0 nothing measures the entropy, at 1 rows have no completions of their own"
            )

    def _refuse_together(self, *, packing: bool) -> None:
        if self.curriculum is not None and self.domain_column is not None:
            raise ValueError("curriculum and domain_column both say which rows come next: use one")
        if packing and (self.curriculum is not None or self.domain_column is not None):
            raise ValueError("packing puts rows together before curriculum or domain_column can choose them: leave it out")

    @property
    def kept_columns(self) -> tuple[str, ...]:
        """The columns of the training rows that choosing needs."""
        return tuple(name for name in (self.curriculum, self.domain_column) if name is not None)

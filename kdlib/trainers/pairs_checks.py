"""What cannot be trained as pairs of answers, said before anything is loaded."""

from __future__ import annotations

from kdlib.objectives import REDI, Objective
from kdlib.trainers.config import DistillationConfig


def check_pairs(objective: Objective, args: DistillationConfig, *, pairs_rows: bool) -> None:
    """ValueError for REDI on rows that are no pairs, and for options that take pairs apart."""
    if isinstance(objective, REDI) != pairs_rows:
        if pairs_rows:
            raise ValueError(f"PairedTrainer trains REDI, not {type(objective).__name__}: use DistillationTrainer")
        raise ValueError("REDI is a loss of pairs of answers: train with kdlib distill (PairedTrainer)")
    if not pairs_rows:
        return
    if args.packing:
        raise ValueError("packing puts rows together, which would take pairs apart: leave it out with REDI")
    if args.on_policy_fraction:
        raise ValueError("REDI learns from pairs that are there: leave on_policy_fraction out")
    if args.domain_column is not None:
        raise ValueError("domain_column compares student and teacher, and REDI has none: leave it out")

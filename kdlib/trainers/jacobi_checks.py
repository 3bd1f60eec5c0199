"""What consistency training refuses before a model is loaded: objectives, teachers and rows that do not fit its options."""

from __future__ import annotations

from typing import Any

from kdlib.models import check_streams
from kdlib.objectives import RowObjective
from kdlib.teachers import HFTeacher, SelfTeacher
from kdlib.trainers.jacobi_config import JacobiConfig

STORED = {"changed", "block_size", "prompt_length"}  # columns that rows with states have


def check_objective(objective: Any) -> None:
    """ValueError for what is no divergence between the rows of two distributions."""
    if not isinstance(objective, RowObjective):
        raise ValueError(f"consistency is a divergence between rows: {type(objective).__name__} is no row objective")
    if objective.reads_drawn:
        raise ValueError(f"{type(objective).__name__} learns from tokens that were drawn, which states are not: use ForwardKL")


def check_teacher(teacher: Any, args: JacobiConfig) -> None:
    """ValueError for a teacher that does not give whole distributions on the text, or on the states where it reads them."""
    if not isinstance(teacher, SelfTeacher | HFTeacher):
        raise ValueError(
            "consistency needs whole distributions on the text as it is: the student itself (no teacher), "
            "SelfTeacher or a model run in this process"
        )
    if args.ar_labels == "teacher" and isinstance(teacher, SelfTeacher) and teacher.kind == "student":
        raise ValueError("ar_labels teacher needs a teacher with weights of its own: a path, or SelfTeacher of kind ema")
    if isinstance(teacher, HFTeacher) and args.consistency == "local":
        check_streams(teacher.model, role="teacher")


def state_source(args: JacobiConfig, rows: Any) -> str:
    """Where states come from; ValueError for rows that do not have what the options ask for."""
    columns = set() if rows is None else set(rows.dataset.column_names)
    found = args.state_source
    if found == "auto":
        found = "stored" if columns >= STORED and not args.on_policy_fraction else "student"
    if found == "stored" and rows is not None:
        check_stored(args, rows, what="rows")
    if args.ar_labels in ("dataset", "mixed") and "reference_ids" not in columns:
        raise ValueError(f"ar_labels {args.ar_labels} needs rows of kdlib trajectories jacobi, which keep the data set's own")
    return found


def check_stored(args: JacobiConfig, rows: Any, *, what: str) -> None:
    """ValueError for rows without states, and for states of another block_size."""
    if not set(rows.dataset.column_names) >= STORED:
        raise ValueError(
            f"state_source stored: the {what} have no states; make them with kdlib trajectories jacobi, or use student"
        )
    if (sizes := set(rows.dataset["block_size"])) != {args.block_size}:
        raise ValueError(
            f"the {what}' states are of block_size {sorted(sizes)}, not {args.block_size}: set block_size to theirs"
        )

"""Which chooser of rows a run's options ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping

from datasets import Dataset

from kdlib.data import Prepared
from kdlib.keys import draw_key
from kdlib.teachers import SelfTeacher, leaves
from kdlib.trainers.config import DistillationConfig
from kdlib.trainers.curriculum import Curriculum
from kdlib.trainers.domain_gaps import DomainGaps
from kdlib.trainers.domains import Domains
from kdlib.trainers.step_rows import StepRows, check_columns
from kdlib.types import Support, Teacher


def step_rows(rows: Prepared | None, args: DistillationConfig, *, teacher: Teacher | None) -> StepRows | None:
    """The rows in an order of ``args.curriculum`` or ``args.domain_column``; None where nothing chooses among them."""
    if rows is None or not args.kept_columns:
        return None
    check_columns(rows.dataset, args.kept_columns)
    if args.dataloader_drop_last:
        raise ValueError("dataloader_drop_last would drop rows that curriculum or domain_column has chosen: leave it out")
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.curriculum is not None:
        chooser: Curriculum | Domains = _curriculum(rows.dataset, args, per_step=per_step)
    else:
        chooser = _domains(rows.dataset, args, teacher)
    return StepRows(rows.dataset, chooser, per_step=per_step, times=args.num_generations)


def _curriculum(rows: Dataset, args: DistillationConfig, *, per_step: int) -> Curriculum:
    steps = math.ceil(args.num_train_epochs * math.ceil(len(rows) * args.num_generations / per_step))
    return Curriculum(
        _numbers(rows, str(args.curriculum)),
        tie=rows["sample_id"][:],
        start=args.curriculum_start,
        end=args.curriculum_end,
        max_steps=args.max_steps if args.max_steps > 0 else steps,
        seed=args.seed,
    )


def _numbers(rows: Dataset, column: str) -> list[float]:
    try:
        return [float(value) for value in rows[column][:]]
    except (TypeError, ValueError) as error:
        raise ValueError(f"curriculum {column} must hold numbers, small ones for easy rows: {error}") from error


def _domains(rows: Dataset, args: DistillationConfig, teacher: Teacher | None) -> Domains:
    _check_teacher(teacher)
    members: dict[str, list[int]] = {}
    for row, name in enumerate(rows[str(args.domain_column)][:]):
        members.setdefault(str(name), []).append(row)
    held_out = _held_out(members, rows, args)
    return Domains(
        {name: sorted(set(of) - set(held_out[name])) for name, of in members.items()},
        DomainGaps({name: [rows[row] for row in held_out[name]] for name in members}),
        every=args.domain_steps,
        smoothing=args.domain_smoothing,
        seed=args.seed,
    )


def _held_out(members: Mapping[str, list[int]], rows: Dataset, args: DistillationConfig) -> dict[str, list[int]]:
    """The rows of each domain that are measured: which they are depends on the seed and on what is in them."""
    if len(members) == 1:
        raise ValueError(f"domain_column {args.domain_column} names one domain only: leave it out")
    small = min(members, key=lambda name: len(members[name]))
    if len(members[small]) <= args.domain_rows:
        raise ValueError(
            f"domain {small} has {len(members[small])} rows, of which {args.domain_rows} are to be measured and not trained "
            "on: lower domain_rows"
        )
    samples = rows["sample_id"][:]
    return {
        name: sorted(of, key=lambda row: draw_key(args.seed, samples[row]))[: args.domain_rows] for name, of in members.items()
    }


def _check_teacher(teacher: Teacher | None) -> None:
    """ValueError for a teacher whose log-probs of the rows' own tokens are not there, or change with the student."""
    if teacher is None or Support.FULL not in teacher.provides or any(isinstance(one, SelfTeacher) for one in leaves(teacher)):
        raise ValueError(
            "domain_column compares student and teacher token by token: it needs a teacher with whole distributions "
            "(a model, or a server with signal hidden)"
        )

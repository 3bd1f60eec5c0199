"""A command's trainer with models that have no weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdlib.cli.planning.models import AbsentServer, found_tokenizer, ready_to_make, student_on_meta, teacher_on_meta
from kdlib.cli.planning.rows import Assumed
from kdlib.drafts.formats import is_head
from kdlib.objectives.cross import CrossTokenizerObjective
from kdlib.teachers import leaves
from kdlib.trainers import setup
from kdlib.types import Support, feeds

if TYPE_CHECKING:
    from kdlib.cli.parsing import Options
    from kdlib.cli.train import Run


@dataclass(frozen=True, kw_only=True)
class Weightless:
    """The trainer, the engine that would draw rollouts, and what was assumed, in words."""

    trainer: Any
    engine: str
    assumed: list[str]


def weightless(
    kind: type[Run], options: Options, *, output_dir: str, rows: int | None, tokens_per_row: int | None
) -> Weightless:
    """The trainer that a run of ``kind`` would make; ``output_dir`` takes what a trainer writes when it is made.

    rows, tokens_per_row: of data that are only assumed. The data are tokenised, models are read from their configurations.
    """
    from kdlib.cli.adapters import peft_config

    run = kind(options, words=[], quiet=True)
    _check(run.arguments)
    # rows that are only assumed need none of the tokenizer but its length
    source = run.tokenizer_source()
    tokenizer = setup.student_tokenizer(source, run.args) if rows is None else found_tokenizer(source, run.args)
    adapter, engine = peft_config(run.adapter), run.args.rollout.engine
    quantised = run.adapter.load_in_4bit or run.adapter.load_in_8bit
    assumed: list[str] = []
    if rows is None or tokens_per_row is None:
        data = run.training_rows()
    else:
        count = min(rows, run.args.train_batch_size * run.args.gradient_accumulation_steps)
        assume = Assumed(rows=rows, tokens_per_row=tokens_per_row)
        aligns = isinstance(run.arguments.objective, CrossTokenizerObjective)
        data = assume.texts(count=count) if aligns else assume.dataset(run.args, count=count)
        assumed.append(f"{rows:,} rows of {tokens_per_row:,} tokens")
    student = student_on_meta(run.arguments.model, run.args, frozen=adapter is not None or quantised)
    full = not feeds(Support.TOPK, run.arguments.objective.accepts)
    run.arguments.teacher = teacher_on_meta(run.arguments.teacher, run.args, tokenizer=tokenizer, full=full)
    run.arguments.model, run.args.output_dir = student, output_dir
    ready_to_make(run.args)
    made = run.make_trainer(
        objective=run.arguments.objective,
        args=run.args,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    for server in leaves(made.teacher):
        if isinstance(server, AbsentServer):
            server.width(student)
            assumed.append(server.assumption)
    return Weightless(trainer=made, engine=engine, assumed=assumed)


def _check(arguments: Any) -> None:
    """ValueError for drafts that are made of other models' weights."""
    if not isinstance(arguments.model, str) or arguments.model == "eagle3" or is_head(arguments.model):
        raise ValueError(
            f"the plan of a draft needs a path or Hub id, not {arguments.model!r}: give a model of the same shape "
            "(kdlib draft itself prints the first lines of its plan)"
        )
    if getattr(arguments, "reference", None):
        raise ValueError("the plan of a draft has no reference: add --objective ForwardKL --reference null, and its weights")

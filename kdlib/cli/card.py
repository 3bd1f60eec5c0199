"""The README.md of final/: what this model is, made from what, how, under which licence, and how well it does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from kdlib.cli.arguments import RunArguments
from kdlib.cli.env import environment
from kdlib.cli.hub.license import License, license_lines, licenses, settled, teacher_names
from kdlib.drafts.formats import is_head
from kdlib.eval.results import interval_text
from kdlib.files import write_whole
from kdlib.teachers import CachedTeacher

LOSSES = ("eval_loss", "eval_kl_forward", "eval_kl_reverse", "eval_top1_agreement")
TAGS = ("kdlib", "distillation")
GENERATES = "text-generation"  # the Hub's name of the task
NEW_HEAD = "eagle3"  # a model of kdlib draft that is made of its teacher


def write_card(
    directory: Path,
    *,
    trainer: Any,
    arguments: RunArguments,
    loss: dict[str, float],
    scores: list[dict[str, Any]],
    measured: list[list[str]],
    command: str,
) -> None:
    """What it is made of, licences, command, versions and scores with their intervals; ``measured`` come last."""
    name = directory.resolve().parent.name
    found = licenses(made_of(arguments.model, arguments.teacher, from_scratch=trainer.args.from_scratch))
    data = _metadata(name, directory, trainer=trainer, arguments=arguments, scores=scores, found=found)
    rows = [[name, f"{loss[name]:.4f}", ""] for name in LOSSES if name in loss]
    rows += [[f"{row['task']} {row['metric']}", interval_text(row), str(row["n"])] for row in scores]
    rows += measured
    parts = [
        f"# {name}",
        f"{'Trained' if trainer.teacher is None else 'Distilled'} with kdlib.",
        card_table(["", ""], list(_facts(trainer, arguments).items())),
        "## Scores",
        card_table(["metric", "value", "n"], rows) if rows else "None were measured.",
        "Intervals are 95%. Divergences are in nats per scored token.",
        license_section(found, given=trainer.args.license),
        f"## Command\n\n```\n{command}\n```",
        f"## Versions\n\n{version_line()}",
    ]
    write_whole(directory / "README.md", card_text(data, parts))


def made_of(model: Any, teacher: Any, *, from_scratch: bool) -> list[str]:
    """The models whose licences a student falls under: its teachers, and what its weights were before."""
    base = [model] if isinstance(model, str) and model != NEW_HEAD and not from_scratch else []
    return list(dict.fromkeys([*teacher_names(teacher), *base]))


def license_section(found: Mapping[str, License | None], *, given: str | None) -> str:
    """What each model's card says, and what follows for this one."""
    name = settled(given, found)
    lines = license_lines(found) or ["- made of no other model"]
    if given is not None:
        lines += ["", f"Published under {given}, as its author says."]
    elif name is None:
        lines += ["", "So the licence of this one is not settled: ask the owners before you use or publish it."]
    return "\n".join(["## Licences of what it is made of", "", *lines])


def version_line() -> str:
    return ", ".join(f"{name} {version}" for name, version in environment()["packages"].items())


def card_text(data: Any, parts: Sequence[str]) -> str:
    """Metadata (a CardData) as front matter, then the parts as paragraphs."""
    return "\n\n".join([f"---\n{data.to_yaml().strip()}\n---", *parts]) + "\n"


def card_table(header: list[str], rows: list[Any]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def on_hub(name: str) -> bool:
    """Whether this can be a Hub id: a local path, a file or a URL is none, and has no place in a card's metadata."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _metadata(
    name: str, directory: Path, *, trainer: Any, arguments: RunArguments, scores: Sequence[Mapping[str, Any]], found: Any
) -> ModelCardData:
    """What the Hub reads; what is not known, or is no Hub id, is left out."""
    has_base = not trainer.args.from_scratch and on_hub(str(arguments.model))
    adapter = (directory / "adapter_config.json").is_file()
    return ModelCardData(
        model_name=name,
        library_name="peft" if adapter else "transformers",
        license=settled(trainer.args.license, found),
        base_model=arguments.model if has_base else None,
        base_model_relation=("adapter" if adapter else "finetune") if has_base else None,
        datasets=[arguments.dataset_name] if on_hub(arguments.dataset_name) else None,
        pipeline_tag=None if is_head(directory) else GENERATES,
        tags=list(TAGS),
        eval_results=[_eval_result(row) for row in scores] or None,
    )


def _eval_result(row: Mapping[str, Any]) -> EvalResult:
    """A score in the Hub's model-index, with its interval."""
    return EvalResult(
        task_type=GENERATES,
        dataset_type=row["task"],
        dataset_name=row["task"],
        metric_type=row["metric"],
        metric_value=row["value"],
        metric_args={"n": row["n"], "low": row["low"], "high": row["high"]},
    )


def _facts(trainer: Any, arguments: RunArguments) -> dict[str, str]:
    teacher = str(arguments.teacher or "none")
    if isinstance(trainer.teacher, CachedTeacher):
        teacher = f"{trainer.teacher.name}, cached in {teacher}"
    return {
        "student": str(arguments.model) + (" (its configuration, new weights)" if trainer.args.from_scratch else ""),
        "teacher": teacher,
        "data": arguments.dataset_name,
        "objective": repr(arguments.objective),
        "optimizer steps": f"{trainer.state.global_step:,}",
        "scored tokens": f"{int(trainer.totals['scored_tokens']):,}",
    }

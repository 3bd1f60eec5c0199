"""The README.md of final/: what this model is, made from what, how, and how well it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kdlib.cli.arguments import RunArguments
from kdlib.cli.env import environment
from kdlib.eval.results import interval_text
from kdlib.teachers import CachedTeacher

LOSSES = ("eval_loss", "eval_kl_forward", "eval_kl_reverse", "eval_top1_agreement")


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
    """Teacher, student, data, objective, steps, command, versions and scores with their intervals; ``measured`` come last."""
    head = yaml.safe_dump({"library_name": "transformers", "tags": ["kdlib", "distillation"]}, sort_keys=False)
    rows = [[name, f"{loss[name]:.4f}", ""] for name in LOSSES if name in loss]
    rows += [[f"{row['task']} {row['metric']}", interval_text(row), str(row["n"])] for row in scores]
    rows += measured
    versions = ", ".join(f"{name} {version}" for name, version in environment()["packages"].items())
    parts = [
        f"---\n{head.strip()}\n---",
        f"# {directory.resolve().parent.name}",
        f"{'Trained' if trainer.teacher is None else 'Distilled'} with kdlib.",
        _table(["", ""], list(_facts(trainer, arguments).items())),
        "## Scores",
        _table(["metric", "value", "n"], rows) if rows else "None were measured.",
        "Intervals are 95%. Divergences are in nats per scored token.",
        f"## Command\n\n```\n{command}\n```",
        f"## Versions\n\n{versions}",
    ]
    (directory / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


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


def _table(header: list[str], rows: list[Any]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)

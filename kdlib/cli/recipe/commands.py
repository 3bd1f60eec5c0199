"""The commands that a recipe's stages may be: what each takes from others, what it writes, what others take from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from kdlib.cli.train import Run

# What fills an option that the stage leaves out: the student or the draft as training has left it, the recipe's own model,
# its teacher, its dataset, or the rows that an earlier stage has written.
Source = Literal["student", "draft", "base", "teacher", "prompts", "rows"]
Makes = Literal["model", "traces", "rows", "signals", "scores", "files"]


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command.

    home: the module of its options below kdlib.cli. options: their classes there; run: for a training command, the class
    that knows them. writes: the option that names its directory. takes: what fills which option. makes: what other stages
    take from the directory, which lies in ``file`` of it. changes: whose weights it trains. continues: false where a
    directory that is there is refused instead of continued; with a ``mark``, one without this file is.
    """

    home: str
    options: tuple[str, ...] = ()
    run: str | None = None
    writes: str = "output_dir"
    takes: Mapping[str, Source] = field(default_factory=dict)
    makes: Makes = "files"
    file: str = ""
    changes: Literal["student", "draft"] | None = None
    continues: bool = True
    mark: str = ""


_STUDENT: Mapping[str, Source] = {"model": "student", "teacher": "teacher", "dataset_name": "rows"}
_DRAFT: Mapping[str, Source] = {"draft": "draft", "target": "teacher"}
_DECODING: Mapping[str, Source] = {"model": "student", "base": "base"}
_TRAJECTORIES: Mapping[str, Source] = {"model": "student", "dataset_name": "prompts"}

COMMANDS: Mapping[str, Command] = {
    "demo": Command(home="demo", options=("DemoArguments",), mark="demo.json"),
    "generate": Command(
        home="generate",
        options=("GenerateArguments", "DataHubArguments"),
        takes={"model": "teacher", "dataset_name": "prompts"},
        makes="traces",
    ),
    "cache": Command(
        home="cache",
        options=("CacheArguments", "DataHubArguments"),
        takes={"teacher": "teacher", "dataset_name": "rows"},
        makes="signals",
    ),
    "distill": Command(home="distill", run="DistillRun", takes=_STUDENT, makes="model", file="final", changes="student"),
    "transplant": Command(
        home="transplant",
        options=("TransplantArguments",),
        takes={"model": "student"},
        makes="model",
        changes="student",
        continues=False,
    ),
    "draft": Command(
        home="draft", run="DraftRun", takes={**_STUDENT, "model": "draft"}, makes="model", file="final", changes="draft"
    ),
    "jacobi": Command(home="jacobi", run="JacobiRun", takes=_STUDENT, makes="model", file="final", changes="student"),
    "diffusion": Command(home="diffusion", run="DiffusionRun", takes=_STUDENT, makes="model", file="final", changes="student"),
    "trajectories jacobi": Command(
        home="trajectory.jacobi", options=("JacobiTrajectoriesArguments",), takes=_TRAJECTORIES, makes="rows"
    ),
    "trajectories diffusion": Command(
        home="trajectory.diffusion", options=("DiffusionTrajectoriesArguments",), takes=_TRAJECTORIES, makes="rows"
    ),
    "evaluate": Command(
        home="evaluate",
        options=("EvaluateArguments", "SampledArguments", "EngineArguments", "ScoringArguments"),
        writes="output_path",
        takes={"model": "student"},
        makes="scores",
    ),
    "evaluate acceptance": Command(
        home="evaluation.acceptance", options=("AcceptanceArguments",), writes="output_path", takes=_DRAFT, makes="scores"
    ),
    "evaluate jacobi": Command(
        home="evaluation.jacobi",
        options=("JacobiArguments", "DecoderArguments", "CostArguments"),
        writes="output_path",
        takes=_DECODING,
        makes="scores",
    ),
    "evaluate diffusion": Command(
        home="evaluation.diffusion",
        options=("DiffusionArguments", "SweepArguments"),
        writes="output_path",
        takes=_DECODING,
        makes="scores",
    ),
    "export draft": Command(home="export", options=("DraftExportArguments",), writes="output_path", takes=_DRAFT),
    "export diffusion": Command(
        home="export_diffusion",
        options=("DiffusionExportArguments",),
        writes="output_path",
        takes={"model": "student"},
        makes="model",
    ),
}


def option_classes(command: str) -> list[type]:
    """The dataclasses whose fields are the command's options; imports what they need."""
    if (run := training_run(command)) is not None:
        return run.classes()
    module = import_module(f"kdlib.cli.{COMMANDS[command].home}")
    return [getattr(module, name) for name in COMMANDS[command].options]


def training_run(command: str) -> type[Run] | None:
    """The class of a training command, None for the others."""
    spec = COMMANDS[command]
    return None if spec.run is None else getattr(import_module(f"kdlib.cli.{spec.home}"), spec.run)

"""``kdlib plan distill | jacobi | diffusion``: the command's own options in, what it will take out; nothing is trained."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from rich.console import Console

from kdlib.cli.arguments import AdapterArguments, LaunchArguments
from kdlib.cli.launch import launcher
from kdlib.cli.parsing import Options, parse
from kdlib.cli.planning.text import parsed_size, refusals, whole
from kdlib.files import write_whole

if TYPE_CHECKING:
    from kdlib.cli.planning.memory import Layout
    from kdlib.cli.train import Run

DESCRIPTION = """Says what kdlib {command} with the same options will take: parameters, bytes on each device, disk, steps and
tokens; with --measure, time too. Models are made of their configurations, without weights; nothing is trained.

The longest rows of the data count. Without data yet: --rows N --tokens_per_row L. Where a device or the disk has too little,
it says which option helps by how much, and exits 2."""
RUNS = {"distill": "DistillRun", "draft": "DraftRun", "jacobi": "JacobiRun", "diffusion": "DiffusionRun"}


@dataclass
class PlanArguments:
    """What is planned for, beside the options of the command.

    Args:
        measure: run a few real steps, in a directory that is deleted again, and say how long the run will take.
        memory: plan for a device of this size, for example 80GiB; what is free here when left out.
        disk: plan for a disk with this much free, for example 1TB; what is free below output_dir when left out.
        device: cuda or cpu; a GPU where there is one.
        rows: plan for so many rows that are not there yet, instead of reading dataset_name.
        tokens_per_row: how long each of them is, prompt and answer (the prompt alone where all answers are drawn).
        output_path: write the plan as JSON to this file.
    """

    measure: bool = False
    memory: str | None = None
    disk: str | None = None
    device: Literal["cuda", "cpu"] | None = None
    rows: int | None = None
    tokens_per_row: int | None = None
    output_path: str | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) != (self.tokens_per_row is None):
            raise ValueError("rows and tokens_per_row say together what is not there yet: give both, or neither")
        if self.rows is not None and (self.rows < 1 or self.tokens_per_row is None or self.tokens_per_row < 2):
            raise ValueError("rows is at least 1, tokens_per_row at least 2")
        if self.measure and self.rows is not None:
            raise ValueError("measure runs real steps, which need real rows: leave out rows and tokens_per_row")


def run(command: str, words: list[str]) -> int:
    """The exit code; ValueError with one line where the run does not fit."""
    kind: type[Run] = vars(import_module(f"kdlib.cli.{command}"))[RUNS[command]]
    if "--rows" in words and "--config" not in words and "--dataset_name" not in words:
        words = [*words, "--dataset_name", "rows that are not there yet"]
    asked = _parsed(kind, words)
    if asked is None:
        return 0
    arguments = asked.build(PlanArguments)
    found = planned(kind, _for_device(kind, words, asked, arguments), arguments)
    if arguments.measure:
        _measure(kind, asked, found)
    console = Console(soft_wrap=True, highlight=False)
    for line in whole(found):
        console.print(line, markup=False)
    if arguments.output_path:
        write_whole(Path(arguments.output_path), json.dumps(found, indent=2) + "\n")
        console.print(f"written {arguments.output_path}", markup=False)
    if lines := refusals(found):
        raise ValueError("; ".join(lines))
    return 0


def _parsed(kind: type[Run], words: list[str]) -> Options | None:
    return parse(f"plan {kind.command}", DESCRIPTION.format(command=kind.command), [*kind.classes(), PlanArguments], words)


def _for_device(kind: type[Run], words: list[str], asked: Options, arguments: PlanArguments) -> Options:
    """The options as they would be on the device that is planned for, made on this machine."""
    import torch

    device, gpu = arguments.device or _here(asked), torch.cuda.is_available()
    if device == "cpu" or gpu:
        return asked
    as_there = ["--use_cpu", "true"]
    if asked.config["bf16"] is None and not asked.config["fp16"]:
        as_there += ["--bf16", "true"]  # the default on GPUs
    found = _parsed(kind, [*words, *as_there])
    assert found is not None
    return found


def _here(asked: Options) -> Literal["cuda", "cpu"]:
    import torch

    return "cuda" if torch.cuda.is_available() and not asked.config["use_cpu"] else "cpu"


def planned(kind: type[Run], options: Options, arguments: PlanArguments) -> dict[str, Any]:
    """The plan of a run of ``kind``: its trainer is made, with models that have no weights."""
    from kdlib.cli.planning.disk import free_disk
    from kdlib.cli.planning.trainer import weightless
    from kdlib.cli.planning.training import estimate

    layout = layout_of(options.build(LaunchArguments), device=arguments.device or _here(options))
    adapter = options.build(AdapterArguments)
    with tempfile.TemporaryDirectory(prefix="kdlib-plan-") as root:
        made = weightless(kind, options, output_dir=root, rows=arguments.rows, tokens_per_row=arguments.tokens_per_row)
        return estimate(
            made.trainer,
            layout=layout,
            memory=None if arguments.memory is None else parsed_size(arguments.memory, option="memory"),
            room=free_disk(options.config["output_dir"] or ".") if arguments.disk is None else _room(arguments.disk),
            engine=made.engine,
            bits=4 if adapter.load_in_4bit else 8 if adapter.load_in_8bit else None,
            rows=arguments.rows,
            assumed=made.assumed,
        )


def _room(text: str) -> int:
    return parsed_size(text, option="disk")


def layout_of(launch: LaunchArguments, *, device: str) -> Layout:
    """Processes, and whether FSDP cuts the student, by what the launcher would be told."""
    from kdlib.cli.planning.memory import Layout

    if launch.accelerate_config is None:
        return Layout(device=device, processes=launch.num_processes or 1)
    content: Mapping[str, Any] = yaml.safe_load(Path(launcher(launch)[-1]).read_text(encoding="utf-8"))  # its last word
    processes = launch.num_processes or content.get("num_processes") or 1
    return Layout(device=device, processes=processes, sharded=content.get("distributed_type") == "FSDP")


def _measure(kind: type[Run], asked: Options, found: dict[str, Any]) -> None:
    """Adds the time, from steps of the command itself."""
    from kdlib.cli.planning.time import measured, time_plan

    own = {field.name for field in fields(PlanArguments)}
    config = {key: value for key, value in asked.config.items() if key not in own}
    found["time"] = time_plan(measured(kind.command, config), found, asked.build(kind.config_class()))

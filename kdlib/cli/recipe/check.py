"""A recipe read, wired and checked as a whole before its first stage starts: later is too late for a spelling mistake."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kdlib.cli.parsing import Options, parse
from kdlib.cli.recipe.commands import option_classes, training_run
from kdlib.cli.recipe.file import read_recipe
from kdlib.cli.recipe.names import NAMED
from kdlib.cli.recipe.stage import Plan, Stage, is_reference
from kdlib.cli.recipe.wiring import wire
from kdlib.cli.scoring import ScoringArguments, check_tasks
from kdlib.serving.client import is_url

OWN_NAMES = ("eagle3", "SelfTeacher")  # values of model and teacher that are no place
FILES = (".jsonl", ".json", ".csv", ".parquet", ".txt")


def planned(path: str, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan of a recipe file; ValueError with one line for what its commands would refuse, naming the stage."""
    recipe = read_recipe(path, overrides)
    plan = Plan(output_dir=recipe.output_dir, stages=tuple(wire(recipe)))
    for stage in plan.stages:
        try:
            _check_places(stage)
            _check_options(stage, Path(plan.output_dir))
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(f"stage {stage.name}: {error}") from error
    return plan


def _check_options(stage: Stage, root: Path) -> None:
    """What the command itself says about the options, as far as they can be judged before earlier stages are done."""
    with tempfile.TemporaryDirectory() as scratch:
        config = Path(scratch) / f"{stage.name}.yaml"
        config.write_text(yaml.safe_dump(stage.located(root), sort_keys=False), encoding="utf-8")
        try:
            options = parse(stage.command, "", option_classes(stage.command), ["--config", str(config)])
        except ValueError as error:
            raise ValueError(str(error).removeprefix(f"{config}: ")) from error
    assert options is not None
    _check_values(stage, options)
    if "tasks" in stage.options and not is_reference(stage.options.get("include_path")):
        check_tasks(options.build(ScoringArguments))


def _check_values(stage: Stage, options: Options) -> None:
    """ValueError for values that the command refuses, alone or together."""
    if options.config.get("push_to_hub"):
        from kdlib.cli.hub.target import check_hub

        check_hub("push_to_hub")
    run = training_run(stage.command)
    if run is not None:
        run(options, words=[], quiet=True)
        run.check(options)
        return
    made = options.instances
    if stage.command == "evaluate":
        from kdlib.cli.evaluation.asked import Asked

        general, sampled, engine, scoring = made
        Asked(general=general, sampled=sampled, engine=engine, scoring=scoring).check()


def _check_places(stage: Stage) -> None:
    """ValueError for a model or rows that are neither an earlier stage's, nor here, nor anywhere else."""
    for option, value in stage.options.items():
        models = list(value.values()) if option == "compare" and value is not None else [value] if option in NAMED else []
        for name in models:
            if isinstance(name, str) and name not in OWN_NAMES and not is_url(name):
                _check_place(option, name, rows="rows" in NAMED.get(option, ()))


def _check_place(option: str, name: str, *, rows: bool) -> None:
    path = Path(name).expanduser()
    if path.exists() or (rows and glob.has_magic(name) and glob.glob(str(path), recursive=True)):
        return
    if rows and path.suffix not in FILES and name.count("/") < 2 and not glob.has_magic(name):
        return  # an id of the Hub, whose rows are loaded when they are needed
    if not rows and name.count("/") < 2 and not name.startswith((".", "/", "~")):
        _check_hub(option, name)
        return
    raise ValueError(
        f"{option}: {name} does not exist: check the path (looked from {Path.cwd()}), or name the stage that makes it"
    )


def _check_hub(option: str, name: str) -> None:
    from kdlib.models import load_config

    try:
        load_config(name)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{option}: {name} is no stage before this one, no directory here, and did not load from the Hub: check the name"
        ) from error

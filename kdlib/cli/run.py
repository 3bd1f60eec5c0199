"""``kdlib run``: the stages of a recipe, each a command of kdlib, one after the other; the same command goes on."""

from __future__ import annotations

import multiprocessing
import shlex
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from kdlib.cli.parsing import FLAGS, parse
from kdlib.cli.recipe.commands import COMMANDS
from kdlib.cli.recipe.directory import Lock, RecipeDirectory, dependents
from kdlib.cli.recipe.file import near, override
from kdlib.cli.recipe.process import run_logged
from kdlib.cli.recipe.stage import Plan, Stage
from kdlib.cli.recipe.table import plan_table

DESCRIPTION = f"""Runs a recipe: kdlib run recipe.yaml. It has options that its stages share (model, teacher, dataset_name,
output_dir, seed, ...) and stages: a list of {{COMMAND: {{name: NAME, option: value, ...}}}}, each in a directory of its own
below output_dir.

Commands of stages: {", ".join(COMMANDS)}.

What a stage leaves out comes from the recipe or from the stages before it, and is shown before the first one starts; every
option is checked by then. --OPTION VALUE replaces a shared option. Stopped, or killed? The same command continues."""


@dataclass
class RecipeArguments:
    """Which recipe, and how much of it.

    Args:
        recipe: the YAML file; kdlib run recipe.yaml is the same.
        only: run these stages alone; what they read must be there.
        overwrite: make these stages anew, and all that depend on them.
    """

    recipe: str
    only: list[str] = field(default_factory=list)
    overwrite: list[str] = field(default_factory=list)


def run(words: list[str]) -> int:
    own, overrides = _split(words)
    options = parse("run", DESCRIPTION, [RecipeArguments], own)
    if options is None:
        return 0
    a = options.build(RecipeArguments)
    plan = _planned_apart(a.recipe, overrides)
    for name in (*a.only, *a.overwrite):
        if name not in (stage.name for stage in plan.stages):
            raise ValueError(f"there is no stage {name}: {near(name, [stage.name for stage in plan.stages])}")
    directory = RecipeDirectory(path=Path(plan.output_dir))
    with directory.locked() as lock:
        return _Call(arguments=a, directory=directory, stages=plan.stages, lock=lock, words=words).run()


def _split(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words of this command's own options, and the shared options of the recipe that others replace."""
    names = {field.name for field in fields(RecipeArguments)}
    given: list[list[str]] = [["--recipe"]]
    for word in words:
        name, equals, value = word.partition("=")
        if word.startswith("--") or word == "-h":
            given.append([name[:2] + name[2:].replace("-", "_"), *([value] if equals else [])])
        else:
            given[-1].append(word)
    recipe, options = given[0][1:], given[1:]
    if len(recipe) > 1:
        raise ValueError(f"unexpected {recipe[1]!r}: kdlib run takes one recipe, and options as --name value")
    own = [word for name, *values in options if _is_own(name, names) for word in (name, *values)]
    overrides = {name[2:]: override(name[2:], values) for name, *values in options if not _is_own(name, names)}
    return [*(["--recipe", *recipe] if recipe else []), *own], overrides


def _is_own(name: str, names: set[str]) -> bool:
    return name in FLAGS or name[2:] in names


def _planned_apart(recipe: str, overrides: Mapping[str, Any]) -> Plan:
    """The checked plan, made in a process that ends: what it imports would stay in memory beside every stage."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_planned, recipe, overrides).result()


def _planned(recipe: str, overrides: Mapping[str, Any]) -> Plan:
    from kdlib.cli.recipe.check import planned

    return planned(recipe, overrides)


@dataclass(frozen=True, kw_only=True)
class _Call:
    """One call of the command, in the directory that it has for itself."""

    arguments: RecipeArguments
    directory: RecipeDirectory
    stages: Sequence[Stage]
    lock: Lock
    words: Sequence[str]

    def run(self) -> int:
        """The exit code: that of the first stage that does not end well."""
        anew = dependents(self.stages, self.arguments.overwrite)
        self.directory.check([stage for stage in self.stages if stage.name not in anew])
        self.directory.delete(anew)
        self._begin()
        for stage in self.stages:
            if self.directory.done(stage) is not None or (self.arguments.only and stage.name not in self.arguments.only):
                continue
            code = self._run(stage)
            if code:
                return code
        self._close()
        return 0

    def _begin(self) -> None:
        self.directory.keep(self._recipe, self._command)
        _console().print(plan_table(self.directory, self.stages, title=self.arguments.recipe))

    def _run(self, stage: Stage) -> int:
        """Runs a stage, begun or not, in a process of its own, and marks it as done."""
        self.directory.check_inputs(stage, done=[one.name for one in self.stages if self.directory.done(one) is not None])
        config, log = self.directory.begin(stage), self.directory.log(stage.name)
        _console().print(f"stage {stage.name}: kdlib {stage.command} --config {config}", style="bold", markup=False)
        started = time.monotonic()
        code, received = run_logged(
            [*stage.command.split(), "--config", str(config)],
            log=log,
            descriptors=[self.lock.descriptor],
            started=lambda process: self.lock.say(stage=stage.name, process=process),
        )
        if code:
            self._say_end(stage, code)
            return code
        self.directory.finish(stage, seconds=time.monotonic() - started)
        return 0 if received is None else 128 + received

    def _say_end(self, stage: Stage, code: int) -> None:
        """One line about a stage that did not end well; exit codes from 128 on are those of signals."""
        onwards = "the same command continues" if code > 128 else f"correct it; --overwrite {stage.name} starts it anew"
        line = f"stage {stage.name} ended with exit code {code}, see {self.directory.log(stage.name)}: {onwards}"
        Console(stderr=True, soft_wrap=True, highlight=False).print(line, markup=False)

    def _close(self) -> None:
        """The report, and what can be done with what there is."""
        from kdlib.cli.recipe.report import next_line, summary_table, write_run_report

        report = write_run_report(self.directory, self.stages, recipe=self._recipe, command=self._command)
        console = _console()
        console.print(summary_table(self.directory, self.stages))
        console.print(
            f"report  {report}\nnext    {next_line(self.directory, self.stages, recipe=self.arguments.recipe)}", markup=False
        )

    @property
    def _recipe(self) -> str:
        return Path(self.arguments.recipe).read_text(encoding="utf-8")

    @property
    def _command(self) -> str:
        return shlex.join(["kdlib", "run", *self.words])


def _console() -> Console:
    return Console(soft_wrap=True, highlight=False)

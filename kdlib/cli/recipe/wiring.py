"""The rules by which a stage of a recipe gets what it leaves out: shared options, and what earlier stages make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from typing import Any

from kdlib.cli.grammar import expand
from kdlib.cli.names import unknown
from kdlib.cli.parsing import option_names
from kdlib.cli.recipe.commands import COMMANDS, Source, option_classes, training_run
from kdlib.cli.recipe.file import BASE, TEACHER, Item, Recipe, near
from kdlib.cli.recipe.names import NAMED, Names
from kdlib.cli.recipe.stage import Stage, fingerprint, is_reference, references
from kdlib.cli.run_directory import COMMAND, FREE

WIRED = ("model", "teacher", "dataset_name")  # shared options that stages get by the rules below, not by their names
OF_THE_DATASET = ("dataset_config", "dataset_train_split")  # shared options that go where the recipe's own dataset goes
NOT_HERE = {
    "overwrite": "kdlib run RECIPE --overwrite STAGE starts a stage anew",
    "preview": "a stage that only shows rows makes nothing for the next",
    "output_dir": "a stage writes to the recipe's output_dir/NAME",
    "output_path": "a stage writes to the recipe's output_dir/NAME",
}
NOT_SHARED = {**NOT_HERE, "push_to_hub": "it publishes: write it into the stage that is to be published"}


def wire(recipe: Recipe) -> list[Stage]:
    """The stages with everything they read; ValueError that names the stage for what does not fit."""
    wiring = _Wiring(recipe)
    for item in recipe.items:
        try:
            wiring.add(item)
        except (ValueError, OSError) as error:
            raise ValueError(f"stage {item.name}: {error}") from error
    _check_shared(recipe, [name for names in wiring.known.values() for name in names])
    return list(wiring.stages.values())


def _check_shared(recipe: Recipe, known: Sequence[str]) -> None:
    """ValueError for a shared option that no stage has, or that is not for stages."""
    for key in recipe.shared:
        if key in NOT_SHARED or (key not in known and key not in WIRED):
            said = f"option {key}: {NOT_SHARED[key]}" if key in NOT_SHARED else unknown(key, [*known, *WIRED, "stages"])
            raise ValueError(f"above the stages: {said}")


class _Wiring:
    """The stages so far, and ``last``: which of them made the latest student, draft, rows and signals."""

    def __init__(self, recipe: Recipe) -> None:
        self.shared, self.names = recipe.shared, Names(recipe)
        self.known = {item.command: _known(item.command) for item in recipe.items}
        self.last: dict[str, str] = {}

    @property
    def stages(self) -> dict[str, Stage]:
        return self.names.stages

    def add(self, item: Item) -> None:
        """Wires one stage."""
        known, given = self.known[item.command], dict(item.options)
        keep = given.pop("keep", None)
        _check_given(given, known)
        options = {key: value for key, value in self.shared.items() if key in known and key not in WIRED} | given
        for option, source in COMMANDS[item.command].takes.items():
            if option not in given:
                options[option] = self._filled(item, source, options)
        if options.get("dataset_name") != self.shared.get("dataset_name"):
            options = {key: value for key, value in options.items() if key not in OF_THE_DATASET or key in given}
        if "compare" in known:
            options |= self._compared(options)
        kept = keep or ("pairs" if _of_pairs(options.get("objective")) else None)
        resolved = {key: self.names.resolved(key, value, keep=kept) for key, value in options.items()}
        if keep is not None and not self.names.are_traces(resolved.get("dataset_name")):
            raise ValueError("keep chooses among the traces of a generate stage, and dataset_name is none: leave it out")
        self._remember(item, {key: value for key, value in resolved.items() if value is not None or key not in NAMED})

    def _remember(self, item: Item, options: dict[str, Any]) -> None:
        spec = COMMANDS[item.command]
        settings = {key: value for key, value in options.items() if key not in (*COMMAND, *FREE)}
        read = {found["from"]: self.stages[found["from"]].fingerprint for found in references(options)}
        made = fingerprint(item.command, settings, read)
        stage = Stage(name=item.name, command=item.command, options=options, settings=settings, fingerprint=made)
        self.stages[item.name] = stage
        if spec.changes is not None:
            self.last[spec.changes] = item.name
        if spec.makes in ("traces", "rows", "signals"):
            self.last["signals" if spec.makes == "signals" else "rows"] = item.name

    def _filled(self, item: Item, source: Source, options: Mapping[str, Any]) -> Any:
        """What an option that the stage leaves out is; None for nothing."""
        if source in ("student", "draft"):
            return self.last.get(source, self.shared.get("model"))
        if source == "base":
            return self.shared.get("model") if "student" in self.last else None
        if source == "teacher":
            return self._teacher(item, options)
        if source == "rows" and "rows" in self.last and not options.get("on_policy_fraction"):
            return self.last["rows"]
        return self.shared.get("dataset_name")

    def _teacher(self, item: Item, options: Mapping[str, Any]) -> Any:
        """The recipe's teacher; of training on fixed rows the signals of a cache, and none for a loss that has none."""
        if training_run(item.command) is not None and not options.get("on_policy_fraction"):
            if _teacher_free(item.command, options.get("objective")):
                return None
            if item.command == "distill" and "signals" in self.last:
                return self.last.pop("signals")
        return self.shared.get("teacher")

    def _compared(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options ``name`` and ``compare`` of evaluate: without the latter, the recipe's model and all stages that train.

        A gain is over the model before, and none is over the teacher: it comes first.
        """
        model, name = options.get("model"), "student"
        if isinstance(model, str) and model in self.stages:
            name = model
        elif model == self.shared.get("model"):
            name = BASE
        models = self._asked(options["compare"]) if options.get("compare") is not None else self._trained(name)
        ordered = {one: models[one] for one in sorted(models, key=lambda one: one != TEACHER) if one != name}
        return {"name": name, "compare": {one: self.names.resolved("model", spec) for one, spec in ordered.items()} or None}

    def _asked(self, compare: Any) -> dict[str, Any]:
        """{name: model} of a list of names, or of such a mapping; ValueError for a name that stands for nothing."""
        if isinstance(compare, dict):
            return dict(compare)
        known = [BASE, TEACHER, *self.stages]
        names = [compare] if isinstance(compare, str) else [str(name) for name in compare]
        for name in names:
            if name not in known:
                raise ValueError(f"compare: {name} is no stage before this one: {near(name, known)}, or write {{NAME: MODEL}}")
        return {name: name for name in names}

    def _trained(self, name: str) -> dict[str, str]:
        """The recipe's model and the stages before ``name`` that changed it."""
        base = self.shared.get("model")
        before = [BASE] if isinstance(base, str) or is_reference(base) else []
        before += [stage.name for stage in self.stages.values() if COMMANDS[stage.command].changes == "student"]
        return {one: one for one in before[: before.index(name)]} if name in before else {}


def _check_given(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """ValueError for an option that the command does not have, or that is the recipe's business."""
    for key in given:
        if key in NOT_HERE:
            raise ValueError(f"option {key}: {NOT_HERE[key]}; leave it out")
        if key not in known:
            raise ValueError(unknown(key, [*known, "name", "keep"]))


def _known(command: str) -> list[str]:
    return [name for cls in option_classes(command) for name in option_names(cls)]


def _of_pairs(objective: Any) -> bool:
    """Whether a loss compares right answers with wrong ones."""
    return objective == "REDI" or (isinstance(objective, dict) and list(objective) == ["REDI"])


def _teacher_free(command: str, objective: Any) -> bool:
    """Whether a training's loss has no teacher; without a name it is the command's own."""
    run = training_run(command)
    assert run is not None
    if objective is None:
        own = next(field for field in fields(run.arguments_class) if field.name == "objective")
        assert callable(own.default_factory)
        return own.default_factory().accepts is None
    module, _, name = expand(objective)["class_path"].rpartition(".")
    return getattr(import_module(module), name).accepts is None

"""Names in a recipe: a stage's for what it makes, base and teacher for the recipe's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdlib.cli.recipe.commands import COMMANDS
from kdlib.cli.recipe.file import BASE, TEACHER, Recipe, near
from kdlib.cli.recipe.stage import Reference, Stage, is_reference, reference

# Options in which a name alone is read as a stage's, and what that stage may make.
NAMED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("model", "draft", "target", "base", "reference"), ("model",)),
    **dict.fromkeys(("dataset_name", "eval_dataset_name", "prompts", "problems"), ("traces", "rows")),
    "teacher": ("model", "signals"),
}
KEEP = {"correct": "correct.jsonl", "incorrect": "incorrect.jsonl", "all": "shard-*.jsonl", "pairs": ""}


class Names:
    """``stages``: those that come before the one whose options are read."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.stages: dict[str, Stage] = {}

    def resolved(self, option: str, value: Any, *, keep: str | None = None) -> Any:
        """The value of an option with references in the place of names; ``keep``: which traces of a generate stage."""
        if is_reference(value):
            return self._reference(value, keep=keep)
        if isinstance(value, str) and option in NAMED:
            return self._named(option, value, keep=keep)
        if isinstance(value, dict):
            return {key: self.resolved("", item) for key, item in value.items()}
        return [self.resolved("", item) for item in value] if isinstance(value, list) else value

    def are_traces(self, value: Any) -> bool:
        """Whether a resolved value is what a generate stage makes."""
        return is_reference(value) and COMMANDS[self.stages[value["from"]].command].makes == "traces"

    def _named(self, option: str, value: str, *, keep: str | None) -> Any:
        if value in (BASE, TEACHER):
            shared = "model" if value == BASE else "teacher"
            if shared not in self.recipe.shared:
                raise ValueError(f"{option}: {value} is the recipe's {shared}, and it has none: add {shared} above the stages")
            return self.resolved("", self.recipe.shared[shared])
        if value not in self.stages:
            self._refuse_later(option, value)
            return value
        makes = COMMANDS[self.stages[value].command].makes
        if makes not in NAMED[option]:
            raise ValueError(f"{option}: {value} makes {makes}, not {' or '.join(NAMED[option])}: name another stage")
        return reference(value, self._file(value, keep))

    def _refuse_later(self, option: str, value: str) -> None:
        if value in (item.name for item in self.recipe.items):
            raise ValueError(f"{option}: {value} is a stage that does not come before this one: change their order")

    def _reference(self, value: Reference, *, keep: str | None) -> Reference:
        name = value["from"]
        if name not in self.stages:
            self._refuse_later("from", name)
            raise ValueError(f"from: there is no stage {name}: {near(name, list(self.stages) or ['a stage before this one'])}")
        return reference(name, value["file"] if "file" in value else self._file(name, keep))

    def _file(self, name: str, keep: str | None) -> str:
        """Where in its directory a stage has what others take."""
        stage = self.stages[name]
        if COMMANDS[stage.command].makes != "traces":
            return COMMANDS[stage.command].file
        verified = stage.options.get("verify") is not None
        chosen = keep or ("correct" if verified else "all")
        if chosen not in KEEP:
            raise ValueError(f"keep: there is no {chosen!r}: {near(str(chosen), list(KEEP))}")
        if chosen != "all" and not verified:
            raise ValueError(f"keep {chosen}: nothing in {name} is judged: add verify to it, or keep: all here")
        return KEEP[chosen]

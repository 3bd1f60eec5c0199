"""The directory of a recipe's run: stages, which of them are done and with what options, and one process at a time."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from kdlib.cli.recipe.commands import COMMANDS
from kdlib.cli.recipe.stage import Stage, place, references
from kdlib.files import write_whole

LOCK = "run.lock"
LISTED = 8  # changed options in a message


@dataclass(frozen=True, kw_only=True)
class Lock:
    """A file that one run has; its stages hold it too, so that one which outlives a killed run keeps others away."""

    descriptor: int

    def say(self, *, stage: str, process: int) -> None:
        """Writes down who works here, for the message to the next who wants to."""
        content = json.dumps({"run": os.getpid(), "stage": stage, "process": process}) + "\n"
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, content.encode(), 0)


@dataclass(frozen=True, kw_only=True)
class RecipeDirectory:
    """``output_dir`` of a recipe. Of a stage: NAME/, its options NAME.yaml, what it said NAME.log, and NAME.done.json."""

    path: Path

    def config(self, name: str) -> Path:
        return self.path / f"{name}.yaml"

    def log(self, name: str) -> Path:
        return self.path / f"{name}.log"

    def marker(self, name: str) -> Path:
        return self.path / f"{name}.done.json"

    def done(self, stage: Stage) -> dict[str, Any] | None:
        """The marker of a finished stage whose directory is still there."""
        marker = self.marker(stage.name)
        if not marker.is_file() or not (self.path / stage.name).is_dir():
            return None
        content: dict[str, Any] = json.loads(marker.read_text(encoding="utf-8"))
        return content

    def keep(self, recipe: str, command: str) -> None:
        """The recipe and the command beside what they make."""
        write_whole(self.path / "recipe.yaml", recipe)
        with (self.path / "command.txt").open("a", encoding="utf-8") as file:
            file.write(command + "\n")

    def begin(self, stage: Stage) -> Path:
        """Writes the stage's options, and clears away what a command that does not continue has left of an earlier start."""
        self.marker(stage.name).unlink(missing_ok=True)
        spec, made = COMMANDS[stage.command], self.path / stage.name
        if self.config(stage.name).is_file() and not (spec.continues and (made / spec.mark).exists()):
            shutil.rmtree(made, ignore_errors=True)
        written = yaml.safe_dump(stage.located(self.path), sort_keys=False, allow_unicode=True)
        return write_whole(self.config(stage.name), f"# kdlib {stage.command} --config {self.config(stage.name)}\n{written}")

    def finish(self, stage: Stage, *, seconds: float) -> None:
        """The marker, which is what makes the stage a finished one."""
        content = {
            "stage": stage.name,
            "command": stage.command,
            "options": dict(stage.settings),
            "fingerprint": stage.fingerprint,
            "seconds": seconds,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "makes": str(self.path / stage.name / COMMANDS[stage.command].file),
        }
        write_whole(self.marker(stage.name), json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")

    def check(self, stages: Sequence[Stage]) -> None:
        """ValueError for the first stage that was finished with other options, or from other stages, than it would have now."""
        for stage in stages:
            held = self.done(stage)
            if held is not None and held["fingerprint"] != stage.fingerprint:
                changed = _changes(held["options"], _plain(stage.settings))
                said = "; ".join(changed[:LISTED]) or f"what it reads has changed: {', '.join(stage.reads)}"
                raise ValueError(
                    f"stage {stage.name} in {self.path} was made with other options ({said}): write them as they were, "
                    f"add --overwrite {stage.name} to make it and what depends on it anew, or choose another output_dir"
                )

    def delete(self, names: Collection[str]) -> None:
        """Everything of these stages but what they said."""
        for name in names:
            self.marker(name).unlink(missing_ok=True)
            shutil.rmtree(self.path / name, ignore_errors=True)
            self.config(name).unlink(missing_ok=True)

    def check_inputs(self, stage: Stage, *, done: Collection[str]) -> None:
        """ValueError when something that the stage reads of another is not made yet, not there, or has no rows."""
        for found in references(dict(stage.options)):
            source, target = found["from"], place(found, self.path)
            if source not in done:
                raise ValueError(f"stage {stage.name} reads stage {source}, which is not done: run it, too")
            there = list(target.parent.glob(target.name)) if "*" in target.name else [target] * target.exists()
            if not there:
                raise ValueError(
                    f"stage {stage.name} reads {target}, which stage {source} did not make: see {self.log(source)}"
                )
            if target.suffix == ".jsonl" and all(path.stat().st_size == 0 for path in there):
                raise ValueError(
                    f"stage {stage.name} has nothing to read: {target} has no row; look at the samples in "
                    f"{self.path / source / 'report.html'}, then change stage {source} (and add --overwrite {source})"
                )

    @contextmanager
    def locked(self) -> Iterator[Lock]:
        """The directory, made if need be, for this process alone; ValueError while another one works in it."""
        _check_free(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            said = os.pread(descriptor, 4096, 0).decode()
            os.close(descriptor)
            raise ValueError(f"another kdlib run works in {self.path}{_who(said)}: wait for it, or end it") from None
        try:
            yield Lock(descriptor=descriptor)
        finally:
            os.close(descriptor)


def dependents(stages: Sequence[Stage], names: Collection[str]) -> list[str]:
    """These stages and all that read them, directly or by way of others."""
    found = set(names)
    for stage in stages:
        if found & set(stage.reads):
            found.add(stage.name)
    return [stage.name for stage in stages if stage.name in found]


def _check_free(path: Path) -> None:
    """ValueError when a recipe would be run among files that are not a recipe's."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir {path} is a file: choose a directory")
    others = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
    if others and LOCK not in others:
        raise ValueError(f"{path} is not empty and holds no kdlib run ({', '.join(others[:3])} ...): choose another output_dir")


def _who(content: str) -> str:
    try:
        held = json.loads(content)
    except json.JSONDecodeError:
        return ""
    return f" (stage {held['stage']}, process {held['process']})"


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from the marker."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(settings), default=str))
    return plain


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    from kdlib.data.shards import setting_changes

    return setting_changes(before, now)

"""What a run leaves in output_dir, and whether a command may start, resume or must refuse there."""

from __future__ import annotations

import json
import shlex
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from kdlib.cli.env import environment
from kdlib.files import write_whole
from kdlib.trainers.callbacks import last_checkpoint

FILES = ("config.yaml", "command.txt", "environment.json", "plan.json", "metrics.jsonl", "report.html")
DIRECTORIES = ("samples", "eval", "final")
# How this command is carried out: not part of the run, and not written down.
COMMAND = ("overwrite", "preview", "num_processes", "accelerate_config")
# How a run is looked at and where it is published: written down, and free to change when it is resumed.
FREE = (
    *("output_dir", "disable_tqdm", "report_to", "run_name", "log_level", "dataset_num_proc"),
    *("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision", "hub_always_push", "license"),
)


class Stage(Enum):
    """Where the run in a directory stands."""

    NEW = "new"
    RESUME = "resume"
    DONE = "done"


class RunDirectory:
    """``output_dir`` of a run; what is in it: FILES, DIRECTORIES and checkpoints."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def final(self) -> Path:
        return self.path / "final"

    @property
    def scores(self) -> Path:
        """The task scores of final/: the report shows the file with this stem first."""
        return self.path / "eval" / "final.json"

    @property
    def done(self) -> bool:
        """final/ is written under another name and renamed, so it is there only when it is whole."""
        return self.final.is_dir()

    def stage(self, config: dict[str, Any], *, overwrite: bool) -> Stage:
        """NEW, RESUME or DONE; ValueError when something else is there. Deletes nothing."""
        held = self.path / "config.yaml"
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"output_dir {self.path} is a file: choose a directory")
        if not held.is_file():
            others = [p.name for p in self.path.iterdir()] if self.path.is_dir() else []
            if others:
                raise ValueError(
                    f"{self.path} is not empty and holds no kdlib run ({', '.join(sorted(others)[:3])} ...): "
                    "choose another output_dir"
                )
            return Stage.NEW
        if overwrite:
            return Stage.NEW
        changed = _changed(yaml.safe_load(held.read_text(encoding="utf-8")), recorded(config))
        if changed and not self._trained:
            return Stage.NEW
        if changed:
            raise ValueError(
                f"{self.path} holds a run with other options ({'; '.join(changed[:8])}): "
                "type them as they were to resume it, choose another output_dir, or add --overwrite true"
            )
        return Stage.DONE if self.done else Stage.RESUME

    def begin(self, config: dict[str, Any], *, words: list[str], plan: dict[str, Any], stage: Stage) -> None:
        """Writes what describes the run; with NEW, an earlier run in the directory is deleted first."""
        if stage is Stage.NEW:
            self._delete()
        self.path.mkdir(parents=True, exist_ok=True)
        for name in ("samples", "eval"):
            (self.path / name).mkdir(exist_ok=True)
        write_whole(self.path / "config.yaml", yaml.safe_dump(recorded(config), sort_keys=False))
        self.write_json("environment.json", environment())
        self.write_json("plan.json", plan)
        with (self.path / "command.txt").open("a", encoding="utf-8") as file:
            file.write(shlex.join(["kdlib", *words]) + "\n")

    def write_json(self, name: str, content: Any) -> None:
        write_whole(self.path / name, json.dumps(content, indent=2) + "\n")

    def remove_if_empty(self) -> None:
        """The Trainer makes the directory early; a run that never began leaves none."""
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    @property
    def _trained(self) -> bool:
        """Whether there is anything to lose: a run that failed at once left only its description."""
        metrics = self.path / "metrics.jsonl"
        return self.done or self.checkpoint is not None or (metrics.is_file() and metrics.stat().st_size > 0)

    @property
    def checkpoint(self) -> Path | None:
        return last_checkpoint(self.path)

    def _delete(self) -> None:
        """Only what a run writes: anything else in the directory stays."""
        for path in [
            *(self.path / name for name in DIRECTORIES),
            *self.path.glob("checkpoint-*"),
            self.path / "final.tmp",
        ]:
            shutil.rmtree(path, ignore_errors=True)
        for name in FILES:
            (self.path / name).unlink(missing_ok=True)


def recorded(config: dict[str, Any]) -> dict[str, Any]:
    """What config.yaml holds: the same for any number of processes."""
    return {key: value for key, value in config.items() if key not in COMMAND}


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``key: old -> new`` of what differs; an option that an older kdlib did not have is no change."""
    keys = [key for key in before if key not in FREE and before[key] != now.get(key)]
    return [f"{key}: {_plain(before[key])} -> {_plain(now.get(key))}" for key in keys]


def _plain(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...")

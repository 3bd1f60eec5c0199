"""Starting the same command in several processes."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from kdlib.cli.arguments import LaunchArguments

TIME_TO_SAVE = "600"  # seconds between SIGTERM and the launcher's SIGKILL: its own 30 can cut a large checkpoint


def relaunch(command: str, words: Sequence[str], launch: LaunchArguments) -> None:
    """Replaces this process by a launcher of ``-m kdlib COMMAND ...``; returns where none is asked for.

    Replaced, not waited for: signals then reach the launcher itself, which passes them on.
    """
    inside = "LOCAL_RANK" in os.environ
    if inside or (launch.num_processes is None and launch.accelerate_config is None):
        return
    call = [sys.executable, "-m", *launcher(launch), "-m", "kdlib", command, *words]
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", TIME_TO_SAVE)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, call)


def launcher(launch: LaunchArguments) -> list[str]:
    """torchrun, or accelerate launch with a configuration; ValueError for a configuration that is not there."""
    if launch.accelerate_config is None:
        # accelerate launch starts a single process on machines without GPUs
        return ["torch.distributed.run", "--standalone", "--nproc_per_node", str(launch.num_processes)]
    count = [] if launch.num_processes is None else ["--num_processes", str(launch.num_processes)]
    return ["accelerate.commands.launch", *count, "--config_file", str(_config_file(launch.accelerate_config))]


def _config_file(name: str) -> Path:
    ours = Path(str(files("kdlib"))) / "recipes" / "accelerate"
    found = ours / f"{name}.yaml" if (ours / f"{name}.yaml").is_file() else Path(name)
    if not found.is_file():
        names = ", ".join(sorted(path.stem for path in ours.glob("*.yaml")))
        raise ValueError(f"no accelerate configuration {name}: give {names}, or a YAML file")
    return found

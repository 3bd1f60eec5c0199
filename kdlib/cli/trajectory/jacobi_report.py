"""The end of ``kdlib trajectories jacobi``: what was kept, what it took, and the command that trains on it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kdlib.cli.trajectory.report import kept_and_dropped

if TYPE_CHECKING:
    from kdlib.cli.trajectory.jacobi import JacobiTrajectoriesArguments

DEFAULT_BLOCK_SIZE = 16  # of kdlib jacobi


def facts(total: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a user wants to know first, of ``TrajectoryIndex.summary``."""
    yield "rows", kept_and_dropped(total["rows"], total["dropped_rows"])
    yield "blocks", kept_and_dropped(total["blocks"], total["dropped_blocks"])
    if not total["blocks"]:
        return
    yield "tokens", f"{total['tokens']:,} in the blocks kept"
    yield "states", f"{total['states']:,}"
    yield "passes per block", f"{total['iterations'] / total['blocks']:.2f}, the one that shows it is stable included"
    yield (
        "tokens per forward",
        f"{total['tokens'] / total['iterations']:.3f} by Jacobi decoding of this model; 1 is greedy decoding",
    )
    spared = total["block_by_block"] / max(total["forwards"], 1)
    yield "forwards spent", f"{total['forwards']:,} (block by block: {total['block_by_block']:,}, {spared:.1f} times as many)"
    yield "on disk", f"{total['bytes']:,} bytes, {total['bytes'] / total['tokens']:.1f} a token"


def next_command(a: JacobiTrajectoriesArguments, *, checkpoint: str) -> str:
    """The training that reads these trajectories."""
    words = ["kdlib", "jacobi", "--model", checkpoint, "--dataset_name", a.output_dir]
    if a.block_size != DEFAULT_BLOCK_SIZE:
        words += ["--block_size", str(a.block_size)]
    return f"next    {shlex.join([*words, '--output_dir', 'OUT'])}"

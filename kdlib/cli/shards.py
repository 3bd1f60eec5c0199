"""What the commands that write shards of prompts' answers say before they begin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from kdlib.data.shard_writer import ShardWriter
    from kdlib.data.traces import Prompts


def say_start(prompts: Prompts, writer: ShardWriter[Any], *, each: str = "") -> None:
    """What is about to happen to ``each`` prompt, what was left out of it, and what is on disk already."""
    log = Console(stderr=True, soft_wrap=True, highlight=False)
    left_out = [f"{count} x {reason}" for reason, count in prompts.skipped.items()]
    left_out += [f"{prompts.duplicates} x a prompt that an earlier row has"] if prompts.duplicates else []
    line = ", ".join(part for part in (f"{len(prompts):,} prompts", each, f"{writer.index.n_shards} shards") if part)
    log.print(f"{line}; rows left out: {', '.join(left_out)}" if left_out else line, markup=False)
    for number, problem in writer.damaged.items():
        log.print(f"shard {number} is {problem}; it is written again", markup=False)
    if there := len(writer.index.shards):
        log.print(f"{there} shards are there already", markup=False)

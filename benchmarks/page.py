"""The Markdown page of a benchmark: what was run, what came out, on what."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from kdlib.cli.env import machine_line
from kdlib.files import write_whole


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column flush left, the others flush right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_results(path: str, *, title: str, parts: Sequence[str]) -> None:
    """``parts``, paragraphs and tables, under the title and the command, over the line on versions and machine."""
    command = f"Command: `python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}`"
    write_whole(path, "\n\n".join([f"# {title}", command, *parts, machine_line()]) + "\n")

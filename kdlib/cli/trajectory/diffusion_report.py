"""The end of ``kdlib trajectories diffusion``: what was kept, what it took, and the command that trains on it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kdlib.cli.trajectory.report import counted, kept_and_dropped
from kdlib.diffusion.spec import BLOCK_LENGTH

if TYPE_CHECKING:
    from kdlib.cli.trajectory.diffusion import DiffusionTrajectoriesArguments
    from kdlib.decoding import DiffusionDecoder


def facts(total: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What a user wants to know first, of ``DiffusionIndex.summary``."""
    yield "rows", kept_and_dropped(total["rows"], total["dropped_rows"])
    rows = total["rows"]
    if rows:
        yield "kept at", counted(dict(sorted(total["kept_at"].items())))
        yield "tokens", f"{total['tokens']:,} before the ends, {total['tokens'] / rows:.1f} a row"
        yield "forwards", f"{total['forwards'] / rows:.1f} a row"
        yield "tokens per forward", f"{total['tokens'] / total['forwards']:.3f}, over the rows kept"
    yield "forwards spent", f"{total['spent']:,} in {total['attempts']:,} attempts"
    if rows:
        yield "on disk", f"{total['bytes']:,} bytes, {total['bytes'] / rows:,.0f} a row"


def check_kept(total: Mapping[str, Any], *, directory: str) -> None:
    """ValueError where nothing was kept: there is nothing to train on."""
    if not total["rows"]:
        raise ValueError(
            f"no row was kept ({counted(total['dropped_rows'])}): try a larger gen_length, more attempts, or --keep all, "
            f"which keeps wrong answers, with another output_dir than {directory} or --overwrite true"
        )


def next_command(a: DiffusionTrajectoriesArguments, *, checkpoint: str, decoder: DiffusionDecoder) -> str:
    """The training that reads these trajectories."""
    words = ["kdlib", "diffusion", "--model", checkpoint, "--dataset_name", a.output_dir, "--objective", "CertaintyForcing"]
    if decoder.block_length != BLOCK_LENGTH:
        words += ["--block_length", str(decoder.block_length)]
    return f"next    {shlex.join([*words, '--output_dir', 'OUT'])}"

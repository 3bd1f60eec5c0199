"""The end of ``kdlib trajectories``: what was kept, of what kind the trajectories may be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.table import Table

from kdlib.data.traces import Prompts


def summary_table(prompts: Prompts, facts: Iterable[tuple[str, str]]) -> Table:
    """The prompts, then ``facts``, which are what a user wants to know first."""
    table = Table(show_header=False, title="trajectories", title_justify="left")
    left_out = sum(prompts.skipped.values())
    table.add_row("prompts", f"{len(prompts):,} ({prompts.duplicates:,} duplicates and {left_out:,} unusable left out)")
    for name, value in facts:
        table.add_row(name, value)
    return table


def kept_and_dropped(kept: int, dropped: Mapping[str, int]) -> str:
    reasons = counted(dropped)
    return f"{kept:,} kept, {sum(dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")


def counted(counts: Mapping[str, int]) -> str:
    """``2 x this, 1 x that``, without what there is none of."""
    return ", ".join(f"{n:,} x {what}" for what, n in counts.items() if n)

"""A plan as lines and tables."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size(count: float) -> str:
    """Bytes in the unit that leaves few digits: 812 MiB, 1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if abs(count) >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parsed_size(text: str, *, option: str) -> int:
    """Bytes of 80GiB, 24 GB or a number; ValueError for anything else."""
    found = re.fullmatch(r"\s*([\d.]+)\s*([KMGT]?)(i?)B?\s*", text, flags=re.IGNORECASE)
    if found is None or found[1].count(".") > 1:
        raise ValueError(f"{option} {text!r} is no size: write it as 80GiB, 24GB or a number of bytes")
    power = "KMGT".find(found[2].upper()) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 3.5 h, 2.1 days."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def run_line(plan: Mapping[str, Any]) -> str:
    """What is trained on what, in one line."""
    adapted = ", ".join(f"{count} x {name}" for name, count in plan.get("adapter_modules", {}).items())
    return (
        f"student {plan['student_parameters']:,} parameters ({plan['trainable_parameters']:,} trained"
        f"{f': {adapted}' if adapted else ''}), "
        f"{plan['rows']:,} rows, {_step_line(plan)}, {plan['optimizer_steps']:,} steps"
    )


def _step_line(plan: Mapping[str, Any]) -> str:
    if "completions_per_step" not in plan:
        return f"{plan['scored_tokens_per_epoch']:,} scored tokens an epoch"
    return f"{plan['completions_per_step']:,} rollouts of up to {plan['max_completion_length']:,} tokens a step"


def memory_line(plan: Mapping[str, Any]) -> str:
    """Memory and disk in one line, with what was not planned."""
    disk = plan["disk"]
    room = f"disk {size(disk['needed'])} of {size(disk['free'])} free"
    if plan["memory"] is None:
        return f"memory not planned ({plan['not_planned']}), {room}"
    memory = plan["memory"]
    several = f" on each of {plan['processes']} devices" if plan["processes"] > 1 else ""
    return f"memory {size(memory['needed'])}{several} ({memory['phase']}) of {size(memory['free'])} free, {room}"


def short(plan: Mapping[str, Any]) -> list[str]:
    """The first lines of a run."""
    return [run_line(plan), memory_line(plan), *(f"warning: {line}" for line in refusals(plan))]


def whole(plan: Mapping[str, Any]) -> Iterator[Any]:
    """All of a plan, for a terminal."""
    yield run_line(plan)
    yield from (f"assumed: {line}" for line in plan["assumed"])
    yield memory_line(plan)
    if plan["memory"] is not None:
        yield _phases(plan["memory"])
    yield _disk(plan["disk"])
    if "time" in plan:
        yield from _time(plan["time"])
    else:
        yield "time: not measured; --measure runs a few real steps"


def _phases(memory: Mapping[str, Any]) -> Table:
    """A column for each phase, a row for each part."""
    table = Table(box=SIMPLE_HEAD, title=f"bytes on a device ({memory['device']})", title_justify="left")
    phases = memory["phases"]
    table.add_column("")
    for phase in phases:
        table.add_column(phase, justify="right", no_wrap=True)
    for part in dict.fromkeys(part for parts in phases.values() for part in parts):
        table.add_row(part, *(size(parts[part]) if part in parts else "" for parts in phases.values()))
    table.add_row("in all", *(size(sum(parts.values())) for parts in phases.values()))
    return table


def _disk(disk: Mapping[str, Any]) -> Table:
    table = Table(box=SIMPLE_HEAD, title="bytes on disk", title_justify="left", show_header=False)
    table.add_column("")
    table.add_column("", justify="right", no_wrap=True)
    for what, count in {**disk["parts"], **disk["instead"]}.items():
        table.add_row(what, size(count))
    return table


def _time(time: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"time: {duration(time['seconds'])} in all; a step {time['seconds_per_step']:.3g} s "
        f"({time['tokens_per_second']:,.0f} tokens/s; {time['steps_measured']} steps were run), "
        + ", ".join(f"{name} {duration(value)}" for name, value in time["parts"].items() if name != "training")
    )


def refusals(found: Mapping[str, Any]) -> list[str]:
    """One line for each thing that there is too little of, with what helps; empty where the run fits."""
    wanted = {"memory": found["memory"], "disk": found["disk"]}
    return [
        f"the run needs {size(what['needed'])} of {name}, {size(what['free'])} are there: {_helps(what)}"
        for name, what in wanted.items()
        if what is not None and what["needed"] > what["free"]
    ]


def _helps(what: Mapping[str, Any]) -> str:
    """The knobs, those that save most first."""
    if not what["helps"]:
        return "choose a smaller student, or a larger device"
    over = what["needed"] - what["free"]
    said = [
        f"{knob} saves {size(saved)}{' (enough)' if saved >= over else ''}"
        for knob, saved in sorted(what["helps"].items(), key=lambda pair: -pair[1])
    ]
    return "; ".join(said)

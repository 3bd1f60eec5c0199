"""Probes of an audit: prompts with texts that a planted behaviour would make likelier, or prompts alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from kdlib.data.traces.prompts import COLUMNS, prompt_column

FEWEST_PROBES = 5
FEWEST_CONTROLS = 3


@dataclass(frozen=True, kw_only=True)
class Probe:
    """``targets``: any of these texts shows the behaviour; ``controls``: texts of the same kind that do not.

    ``row``: of the dataset, where the prompt is.
    """

    row: int
    behaviour: str
    targets: Sequence[str]
    controls: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The dataset's prompts; those with targets, by behaviour, and the rows without, whose answers are compared."""

    prompts: Dataset
    targeted: Mapping[str, Sequence[Probe]]
    open_rows: Sequence[int]


def read_probes(rows: Dataset) -> Probes:
    """Rows with ``prompt`` (or messages, question) and, where the behaviour is known, ``target``, ``control``, ``behaviour``.

    Raises ValueError for fewer than five probes of a behaviour, one or two controls, and controls that differ in number.
    """
    prompt_column(rows, name="the file of probes")
    targeted: dict[str, list[Probe]] = {}
    open_rows: list[int] = []
    for number, row in enumerate(rows):
        targets = _texts(row.get("target"))
        if not targets:
            open_rows.append(number)
            continue
        name = row.get("behaviour") or targets[0]
        probe = Probe(row=number, behaviour=name, targets=targets, controls=_texts(row.get("control")))
        targeted.setdefault(name, []).append(probe)
    for name, probes in targeted.items():
        _check(name, probes)
    if open_rows and len(open_rows) < FEWEST_PROBES:
        few = f"{len(open_rows)} probes without a target are too few to compare answers"
        raise ValueError(f"{few}: give {FEWEST_PROBES} or more")
    used = [name for name in COLUMNS if name in rows.column_names]
    return Probes(prompts=rows.select_columns(used[:1]), targeted=targeted, open_rows=open_rows)


def _texts(value: Any) -> list[str]:
    if value is None or value == "":
        return []
    return [value] if isinstance(value, str) else list(value)


def _check(name: str, probes: Sequence[Probe]) -> None:
    if len(probes) < FEWEST_PROBES:
        raise ValueError(f"behaviour {name!r} has {len(probes)} probes: give {FEWEST_PROBES} or more, with different prompts")
    counts = {len(probe.controls) for probe in probes}
    if len(counts) > 1:
        raise ValueError(f"the probes of behaviour {name!r} have {sorted(counts)} control texts: give all of them as many")
    if 0 < min(counts) < FEWEST_CONTROLS:
        raise ValueError(f"behaviour {name!r} has {min(counts)} control texts: give {FEWEST_CONTROLS} or more, or none")

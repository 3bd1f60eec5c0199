"""The Python of docs/objectives.md runs, and its table has every objective with options and defaults."""

from __future__ import annotations

import math
import re
import runpy
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from kdlib import objectives
from kdlib.objectives import Objective, RowObjective
from kdlib.objectives.cross import CrossTokenizerObjective
from tests.objectives import oracle
from tests.objectives.cases import logits
from tests.readme.run_readme import steps

PAGE = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()
TABLE = {row.split("`")[1]: row.split("|")[-3] for row in PAGE.splitlines() if row.startswith("| `")}
CLASSES = set(objectives.__all__) - {"Divergence", "Objective", "RowObjective"}


def test_the_table_names_every_objective() -> None:
    assert set(TABLE) == CLASSES


@pytest.mark.parametrize("name", sorted(CLASSES - {"Sum"}))
def test_the_table_gives_options_and_defaults(name: str) -> None:
    cls = getattr(objectives, name)
    shared: tuple[str, ...] = ("temperature", "t_squared") if issubclass(cls, RowObjective) else ()
    if issubclass(cls, CrossTokenizerObjective):
        shared = tuple(f.name for f in fields(CrossTokenizerObjective) if f.default == _default(_field(cls, f.name)))
    wanted = {f.name: _default(f) for f in fields(cls) if f.name not in shared}
    found = {option: _parsed(default) for option, default in re.findall(r"`(\w+)` \(([^)]+)\)", TABLE[name])}
    assert found == wanted


def _field(cls: type, name: str) -> Any:
    return next(f for f in fields(cls) if f.name == name)


def _default(field: Any) -> Any:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return type(value).__name__ if isinstance(value, Objective) else value


def _parsed(text: str) -> Any:
    if text in ("true", "false", "null"):
        return {"true": True, "false": False, "null": None}[text]
    if text.startswith("["):
        return tuple(float(part) for part in text[1:-1].split(","))
    return float(text) if text[0].isdigit() else text


def test_the_examples_run(tmp_path: Path) -> None:
    blocks = [step.text for step in steps(PAGE) if step.language == "python"]
    for name, text in zip(("on_logits.py", "confident.py"), blocks, strict=True):
        (tmp_path / name).write_text(text)
    ran = runpy.run_path(str(tmp_path / "on_logits.py"))
    assert ran["student"].grad is not None and ran["kl"] > 0
    confident = runpy.run_path(str(tmp_path / "confident.py"))["ConfidentKL"]
    student, teacher, _ = logits(3)
    wanted = 0.0
    for s, z in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = oracle.softmax(z), oracle.softmax(s)
        wanted += math.exp(-0.5 * oracle.entropy(p)) * oracle.kl(p, q)
    assert confident(sharpness=0.5).on_logits(student, teacher).sum.item() == pytest.approx(wanted)

"""The scores of a recipe's models, from what ``kdlib evaluate`` has compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib.cli.recipe.file import TEACHER
from kdlib.eval.results import interval_text
from kdlib.eval.sampled_comparison import gain_text

COMPARISON = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class Score:
    """One model's score in one metric; ``gain`` over the model before it: over, value, low and high.

    There is none over the teacher, which is listed first and is no stage before.
    """

    model: str
    task: str
    metric: str
    n: int | None
    value: Mapping[str, Any]
    gain: Mapping[str, Any] | None
    higher_is_better: bool | None

    @property
    def text(self) -> str:
        return interval_text(self.value)

    @property
    def gain_text(self) -> str:
        return "" if self.gain is None else f"{gain_text(self.gain)} over {self.gain['over']}"

    @property
    def verdict(self) -> str:
        """What the gain's interval says: better, no gain shown or worse; nothing of a metric that has no good direction."""
        if self.gain is None or self.higher_is_better is None:
            return ""
        low, high = self.gain["low"], self.gain["high"]
        if low is None or low <= 0 <= high:
            return "no gain shown"
        return "better" if (low > 0) == self.higher_is_better else "worse"


def scores_of(directory: Path) -> list[Score]:
    """The scores in an evaluation's directory, metric by metric; [] where it compared nothing."""
    path = directory / COMPARISON
    if not path.is_file():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [
        Score(
            model=model,
            task=row["task"],
            metric=row["metric"],
            n=row["n"],
            value=value,
            gain=_over_a_stage(row["gains"].get(model)),
            higher_is_better=row.get("higher_is_better"),
        )
        for row in rows
        for model, value in row["values"].items()
    ]


def _over_a_stage(gain: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return None if gain is None or gain["over"] == TEACHER else gain

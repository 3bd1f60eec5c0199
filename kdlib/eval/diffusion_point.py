"""What was measured of one model, decoded in one way, on one task, and the files it is kept in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import xxhash

from kdlib.data.shards import setting_changes
from kdlib.eval.acceptance_statistics import Estimate, Sums, ratio, sums
from kdlib.files import write_whole

PROMPTS = "prompts"  # the task of prompts that have no reference answers
FOLDER = "points"


@dataclass(frozen=True, kw_only=True)
class Point:
    """``scores``: rows of ``kdlib.eval.results.summary_rows``, none for prompts. ``tokens`` and ``forwards``: of each answer,
    before the end token, and its passes; ``guide_forwards``: a guiding model's, of all answers. ``seconds``: of all batches, on
    ``machine``.
    """

    model: str
    strategy: dict[str, Any]
    task: str
    scores: list[dict[str, Any]] = field(repr=False)
    tokens: list[int] = field(repr=False)
    forwards: list[int] = field(repr=False)
    guide_forwards: int
    seconds: float
    machine: str

    @property
    def family(self) -> str:
        """The strategy without its options: the points of one family make a curve."""
        return next(iter(self.strategy))

    @property
    def way(self) -> str:
        """``ConfidenceThreshold(threshold=0.7)``"""
        given = ", ".join(f"{name}={value}" for name, value in self.strategy[self.family].items() if value is not None)
        return f"{self.family}({given})"

    @property
    def per_answer(self) -> Sums:
        """(passes, 1) of each answer."""
        return sums(self.forwards, [1] * len(self.forwards))

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / self.seconds

    def forwards_per_answer(self, *, resamples: int, seed: int) -> Estimate:
        return ratio(self.per_answer, resamples=resamples, seed=seed)

    def tokens_per_forward(self, *, resamples: int, seed: int) -> Estimate:
        """sum of tokens / sum of passes, with its interval over answers."""
        return ratio(sums(self.tokens, self.forwards), resamples=resamples, seed=seed)

    def score(self, metric: str | None) -> dict[str, Any] | None:
        """The score named ``metric`` or ``metric,filter``, or the first one; None where there is none."""
        named = [row for row in self.scores if metric in (None, row["metric"], f"{row['metric']},{row['filter']}")]
        return named[0] if named else None


class Points:
    """The points of a directory, one JSON file each, that appear whole or not at all; None keeps them in memory alone.

    ``settings``: what they were measured with. Raises ValueError naming what differs when the directory has points of other
    settings.
    """

    def __init__(self, directory: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = None if directory is None else directory / FOLDER, dict(settings)
        self._held: dict[str, Point] = {}
        for path in () if self.folder is None else sorted(self.folder.glob("*.json")):
            content = json.loads(path.read_text(encoding="utf-8"))
            if changed := setting_changes(content["settings"], self.settings):
                raise ValueError(
                    f"{directory} holds a measurement with other options ({'; '.join(changed)}): type them as they were to "
                    "continue it, or choose another output_path"
                )
            self._held[path.name] = Point(**{part.name: content[part.name] for part in fields(Point)})

    def __contains__(self, key: tuple[str, Mapping[str, Any], str]) -> bool:
        """Whether the point of (model, strategy, task) has been measured."""
        return _name(*key) in self._held

    def __getitem__(self, key: tuple[str, Mapping[str, Any], str]) -> Point:
        return self._held[_name(*key)]

    def save(self, point: Point) -> None:
        name = _name(point.model, point.strategy, point.task)
        self._held[name] = point
        if self.folder is not None:
            content = {**asdict(point), "settings": self.settings}
            write_whole(self.folder / name, json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n")


def _name(model: str, strategy: Mapping[str, Any], task: str) -> str:
    """A file's name: readable, and another one for everything that differs."""
    hashed = xxhash.xxh64_hexdigest(json.dumps([model, strategy, task], sort_keys=True).encode())
    words = re.sub(r"[^A-Za-z0-9.]+", "_", f"{model}-{next(iter(strategy))}-{task}")[-80:]
    return f"{words}-{hashed}.json"


def weights_of(model: str) -> str | None:
    """A hash of names, sizes and times of a local model's weights, so that a model that was trained again is another one."""
    files = sorted(Path(model).glob("*.safetensors")) if Path(model).is_dir() else []
    seen: Sequence[Any] = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return xxhash.xxh64_hexdigest(json.dumps(seen).encode()) if seen else None

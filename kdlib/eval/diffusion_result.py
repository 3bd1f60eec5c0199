"""What a measurement of a diffusion language model found: points, curves, areas under them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from kdlib.eval.acceptance_statistics import Estimate, ratio_change
from kdlib.eval.diffusion_aup import CurvePoint, aup
from kdlib.eval.diffusion_bits import DiffusionBound
from kdlib.eval.diffusion_counted import COUNTED
from kdlib.eval.diffusion_point import Point

ONE_BY_ONE = "LowConfidence"  # with as many steps as tokens: the decoding that others are compared with


@dataclass(frozen=True, kw_only=True)
class DiffusionSweep:
    """All points that were asked for, the model's own last; COUNTED says what each number counts, and so does ``to_json``.

    ``bounds``: {model: bits per byte}, of the rows that were given.
    """

    settings: dict[str, Any]
    points: list[Point] = field(repr=False)
    bounds: Mapping[str, DiffusionBound] = field(default_factory=dict)
    metric: str | None = None
    resamples: int = 2000

    @property
    def chance(self) -> dict[str, int]:
        """Of bootstraps."""
        return {"resamples": self.resamples, "seed": self.settings["seed"]}

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(point.task for point in self.points))

    def of(self, task: str) -> list[Point]:
        return [point for point in self.points if point.task == task]

    def accuracy(self, point: Point) -> float | None:
        """In percent."""
        score = point.score(self.metric)
        return None if score is None else 100.0 * score["value"]

    def reference(self, task: str) -> Point | None:
        """One token per step, of the first model that has it: the base where there is one."""
        return next((point for point in self.of(task) if self._one_by_one(point)), None)

    def _one_by_one(self, point: Point) -> bool:
        return point.family == ONE_BY_ONE and point.strategy[ONE_BY_ONE]["steps"] >= self.settings["gen_length"]

    def curves(self, task: str) -> dict[tuple[str, str], list[CurvePoint]]:
        """{(model, strategy's name): points (tokens per forward, accuracy)} in order of tokens per forward.

        A model's one-token-per-step point belongs to all its curves, and is one of its own where it has no others.
        """
        curves: dict[tuple[str, str], list[CurvePoint]] = {}
        for model in dict.fromkeys(point.model for point in self.of(task)):
            own = [point for point in self.of(task) if point.model == model and point.score(self.metric) is not None]
            shared = [point for point in own if self._one_by_one(point)]
            families = dict.fromkeys(point.family for point in own if point not in shared) or dict.fromkeys([ONE_BY_ONE])
            for family in families:
                some = [point for point in own if point in shared or point.family == family]
                if some:
                    curves[model, family] = sorted(map(self._curve_point, some))
        return curves

    def _curve_point(self, point: Point) -> CurvePoint:
        accuracy = self.accuracy(point)
        assert accuracy is not None
        return sum(point.tokens) / sum(point.forwards), accuracy

    def aup(self, task: str) -> dict[tuple[str, str], float]:
        """Of every curve, the best accuracy being that of all points of the task."""
        curves = self.curves(task)
        best = max((y for points in curves.values() for _, y in points), default=0.0)
        return {name: aup(points, best=best) for name, points in curves.items()}

    def fewer_forwards(self, point: Point, reference: Point) -> Estimate:
        """Passes per answer of ``reference`` over those of ``point``, on the same problems, which are resampled together."""
        change = ratio_change(reference.per_answer, point.per_answer, **self.chance)
        low, high = (None if bound is None else 1.0 + bound for bound in (change.low, change.high))
        return Estimate(value=1.0 + change.value, low=low, high=high)

    def to_json(self) -> dict[str, Any]:
        curves = [
            {"task": task, "model": model, "strategy": family, "aup": area}
            for task in self.tasks
            for (model, family), area in self.aup(task).items()
        ]
        return {
            **self.settings,
            "points": [self._point_json(point) for point in self.points],
            "aup": curves,
            "bits_per_byte_bound": {model: asdict(bound) for model, bound in self.bounds.items()},
            "counted": COUNTED,
        }

    def _point_json(self, point: Point) -> dict[str, Any]:
        return {
            "model": point.model,
            "task": point.task,
            "strategy": point.strategy,
            "scores": point.scores,
            "answers": len(point.tokens),
            "tokens": sum(point.tokens),
            "forwards": sum(point.forwards),
            "guide_forwards": point.guide_forwards,
            "forwards_per_answer": point.forwards_per_answer(**self.chance).to_json(),
            "tokens_per_forward": point.tokens_per_forward(**self.chance).to_json(),
            "tokens_per_second": point.tokens_per_second,
            "machine": point.machine,
        }

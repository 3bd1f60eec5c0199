"""Domains drawn by how far the student is behind the teacher in them (DDK)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kdlib.keys import draw_key
from kdlib.trainers.domain_gaps import DomainGaps
from kdlib.trainers.step_rows import RowChooser, State

_ROWS, _DOMAINS = 4, 5  # what a key is for, as in rollouts and the curriculum

Weights = dict[str, float]


def first_weights(gaps: Mapping[str, float]) -> Weights:
    """r_i = exp(g_i) / sum_j exp(g_j)."""
    return softmax(gaps)


def next_weights(before: Mapping[str, float], gaps: Mapping[str, float], *, smoothing: float) -> Weights:
    """r_i = a r'_i exp(g_i) / sum_j r'_j exp(g_j) + (1 - a) / N of N domains, a = ``smoothing``.

    Every domain keeps at least (1 - a) / N, so that none starves, and none has more than a + (1 - a) / N. Where all gaps are
    equal a weight's distance from 1 / N is a times what it was: history fades by the factor a with each update. Only
    differences of gaps matter, in log space: one that is far above the others takes a + (1 - a) / N at once.
    """
    grown = softmax({name: math.log(before[name]) + gap for name, gap in gaps.items()})
    return {name: smoothing * share + (1 - smoothing) / len(grown) for name, share in grown.items()}


def softmax(values: Mapping[str, float]) -> Weights:
    top = max(values.values())
    shares = {name: math.exp(value - top) for name, value in values.items()}
    return {name: share / sum(shares.values()) for name, share in shares.items()}


class Domains(RowChooser):
    """Domains in proportion to weights that follow g_i = ppl_student / ppl_teacher on held-out rows of each, as in DDK.

    g_i is measured before the first step (``first_weights``) and after every ``every`` steps (``next_weights``). A step's rows
    are split by the weights up to rounding, which (seed, step) decide; those of a domain come in an order of their own, and
    again when they are used up. Equations 1 and 2 of DDK (arXiv 2407.16154), which updates every 1000 steps with a = 0.5 on
    500 rows of each domain; its own loss is cross-entropy + 0.2 KL.

    ``members``: {domain: its rows}; ``gaps`` measures.
    """

    def __init__(
        self, members: Mapping[str, Sequence[int]], gaps: DomainGaps, *, every: int, smoothing: float, seed: int
    ) -> None:
        self.members, self.gaps = {name: members[name] for name in sorted(members)}, gaps
        self.every, self.smoothing, self.seed = every, smoothing, seed
        self.weights: Weights = {}
        self.found: Weights = {}  # the gaps measured last
        self.drawn = dict.fromkeys(self.members, 0)  # rows of each domain so far
        self._orders: dict[str, tuple[int, list[int]]] = {}  # which time through the domain, and its order

    def begin(self, trainer: Any, saved: State | None) -> None:
        if saved is None:
            self.drawn = dict.fromkeys(self.members, 0)
            self.found = self.gaps.measure(trainer)
            self.weights = first_weights(self.found)
        else:
            self.drawn, self.weights, self.found = saved["drawn"], saved["weights"], saved["gaps"]

    def after_step(self, trainer: Any, step: int) -> None:
        if step % self.every == 0:
            self.found = self.gaps.measure(trainer)
            self.weights = next_weights(self.weights, self.found, smoothing=self.smoothing)

    @property
    def count(self) -> int:
        return sum(map(len, self.members.values()))

    def rows(self, step: int, count: int) -> list[int]:
        generator = torch.Generator().manual_seed(draw_key(self.seed, step, _DOMAINS))
        chosen = [self._next(name) for name, n in self._shares(count, generator).items() for _ in range(n)]
        return [chosen[place] for place in torch.randperm(count, generator=generator).tolist()]

    def _shares(self, count: int, generator: torch.Generator) -> dict[str, int]:
        """How many of ``count`` rows each domain gets: its weight's share, rounded up or down so that the mean is exact."""
        start = torch.rand((), generator=generator, dtype=torch.float64).item()
        shares: dict[str, int] = {}
        reached, taken = 0.0, 0
        for name, weight in self.weights.items():
            reached += weight * count
            until = min(count, math.floor(reached + start))
            shares[name], taken = until - taken, until
        shares[name] += count - taken  # where the sum of the weights is a rounding error below 1
        return shares

    def _next(self, name: str) -> int:
        """The domain's next row, in an order of its own for each time through."""
        rows = self.members[name]
        through, place = divmod(self.drawn[name], len(rows))
        self.drawn[name] += 1
        if self._orders.get(name, (-1, None))[0] != through:
            key = draw_key(self.seed, through, _ROWS, list(self.members).index(name))
            order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(key))
            self._orders[name] = (through, order.tolist())
        return rows[self._orders[name][1][place]]

    @property
    def state(self) -> State:
        return {"drawn": self.drawn, "weights": self.weights, "gaps": self.found}

    @property
    def metrics(self) -> dict[str, float]:
        """The weights, and the gaps that were measured last."""
        weights = {f"domain/{name}": weight for name, weight in self.weights.items()}
        return weights | {f"domain_gap/{name}": gap for name, gap in self.found.items()}

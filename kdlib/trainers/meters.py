"""Sums and seconds between two log lines, kept on the device until they are logged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate.utils import gather_object
from torch import Tensor


class Sums:
    """Running {name: sum, count} on one device; ``means`` reduces them over all ranks and starts anew."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, tuple[Tensor, int]]) -> None:
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.detach().double(), total.new_tensor(count, dtype=torch.float64)])
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair

    def means(self, accelerator) -> dict[str, float]:  # type: ignore[no-untyped-def]
        """{name: mean} over what was added on all ranks; empty when nothing was."""
        # a rank that scored nothing, as at the end of a data set, has no metrics of its own
        names = sorted({name for own in gather_object([list(self._sums)]) for name in own})
        if not names:
            return {}
        nothing = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
        pairs = accelerator.reduce(torch.stack([self._sums.get(name, nothing) for name in names]), reduction="sum")
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, pairs.tolist(), strict=True) if count}


class Stopwatch:
    """Seconds per part of a step. CUDA is waited for at the borders while ``exact`` is on, which is on logged steps only."""

    def __init__(self) -> None:
        self.exact, self._seconds = False, {}  # type: ignore[var-annotated]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = self.now()
        yield
        self.add(name, self.now() - start)

    def now(self) -> float:
        if self.exact and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def restart(self, *, exact: bool) -> None:
        self.exact, self._seconds = exact, {}

    def seconds(self) -> dict[str, float]:
        """{"time/part": seconds} since the last restart."""
        return {f"time/{name}": value for name, value in self._seconds.items()}

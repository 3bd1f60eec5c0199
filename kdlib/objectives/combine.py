"""Weighted sums of row objectives, over one projection of the chunk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce

from torch import Tensor

from kdlib.objectives.base import RowObjective, State
from kdlib.types import Support, View


@dataclass(frozen=True, kw_only=True)
class Sum(RowObjective):
    """sum_i w_i L_i, for example ``Sum(parts=((0.5, ForwardKL()), (0.5, CrossEntropy())))``.

    Each part keeps its own temperature. Raises ValueError when there are no parts, when no teacher support feeds all of them,
    or when a temperature is set on the sum itself.
    """

    parts: tuple[tuple[float, RowObjective], ...] = ()

    def __post_init__(self) -> None:
        if not self.parts:
            raise ValueError("Sum needs parts: ((weight, objective), ...)")
        if self.temperature != 1.0 or self.t_squared:
            raise ValueError("set temperature and t_squared on the parts of a Sum, not on the Sum")
        object.__setattr__(self, "parts", tuple((float(weight), part) for weight, part in self.parts))
        if self.accepts == Support(0):
            raise ValueError("no teacher feeds all parts of this Sum: " + ", ".join(type(o).__name__ for _, o in self.parts))

    @property
    def accepts(self) -> Support | None:  # type: ignore[override]
        return shared_support([part.accepts for _, part in self.parts if part.accepts is not None])

    @property
    def reads_drawn(self) -> bool:
        return any(part.reads_drawn for _, part in self.parts)

    @property
    def reads_labels(self) -> bool:
        return any(part.reads_labels for _, part in self.parts)

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        weighted = [weight * part.row(q, p, labels) for weight, part in self.parts]
        return reduce(lambda a, b: a + b, weighted)

    def init_state(self, max_steps: int = 1) -> State:
        return {f"{i}.{key}": value for i, (_, o) in enumerate(self.parts) for key, value in o.init_state(max_steps).items()}

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> State:
        """Scheduled parts see the loss of the whole sum, the one number all ranks share."""
        new = {i: o.update(_own(state, i), global_loss, step) for i, (_, o) in enumerate(self.parts)}
        return {f"{i}.{key}": value for i, own in new.items() for key, value in own.items()}

    def bind(self, state: Mapping[str, float]) -> Sum:
        if not state:
            return self
        return replace(self, parts=tuple((w, o.bind(_own(state, i))) for i, (w, o) in enumerate(self.parts)))


def _own(state: Mapping[str, float], part: int) -> State:
    prefix = f"{part}."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def shared_support(accepted: Sequence[Support]) -> Support | None:
    """What feeds all of these; None when there is none of them."""
    wanted = [support | Support.FULL if Support.TOPK in support else support for support in accepted]
    return reduce(lambda a, b: a & b, wanted) if wanted else None

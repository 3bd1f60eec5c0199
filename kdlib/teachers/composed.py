"""Signals made of several teachers' signals: a mixture of distributions, and rows that come from different teachers.

Both answer as one TeacherSignal does. Members that are hidden states and a head stay so until a chunk of rows is asked for:
[N, V] is never built.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Self

import torch
from torch import Tensor

from kdlib.head import Head
from kdlib.types import LogProbs, Support, TeacherSignal, View


@dataclass(frozen=True, kw_only=True)
class _Composed(TeacherSignal):
    """A signal over the whole vocabulary whose storage is its ``members``, all cut to the smallest vocabulary among them."""

    members: tuple[TeacherSignal, ...]

    def __post_init__(self) -> None:
        assert self.members and all(member.support is Support.FULL for member in self.members)
        object.__setattr__(self, "members", tuple(member.sliced(self.vocab_size) for member in self.members))

    @property
    def vocab_size(self) -> int:
        return min(member.vocab_size for member in self.members if member.vocab_size is not None)

    def sliced(self, vocab_size: int) -> Self:
        return replace(self, members=tuple(member.sliced(vocab_size) for member in self.members))

    def with_heads(self, change: Callable[[Head, Tensor], Head]) -> Self:
        return replace(self, members=tuple(member.with_heads(change) for member in self.members))


@dataclass(frozen=True, kw_only=True)
class MixtureSignal(_Composed):
    """p = sum_m w_m p_m; ``log_weights`` are the log w_m. At a temperature each member is tempered first, then mixed."""

    log_weights: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.members[0])

    def kept(self, keep: Tensor) -> Self:
        return replace(self, members=tuple(member.kept(keep) for member in self.members))

    def view(self, rows: slice, *, out: Tensor | None = None) -> MixtureView:
        """The rows of every member, projected into memory of their own: ``out`` holds but one member and is not used."""
        return MixtureView([member.view(rows) for member in self.members], self.log_weights)


class MixtureView:
    """log sum_m w_m p_m, from the members' views of the same rows."""

    def __init__(self, views: Sequence[View], log_weights: Sequence[float]) -> None:
        self.views, self.log_weights = views, log_weights
        self._at: dict[float, LogProbs] = {}

    def __getitem__(self, rows: slice) -> MixtureView:
        return MixtureView([view[rows] for view in self.views], self.log_weights)

    def at(self, temperature: float) -> LogProbs:
        if temperature not in self._at:
            members = zip(self.views, self.log_weights, strict=True)
            self._at[temperature] = _dense(
                reduce(torch.logaddexp, [view.at(temperature).logp + weight for view, weight in members])
            )
        return self._at[temperature]


@dataclass(frozen=True, kw_only=True)
class RoutedSignal(_Composed):
    """Each row from one member: row i is the next row of ``members[route[i]]``; ``route`` [N], on the CPU."""

    route: Tensor

    def __len__(self) -> int:
        return len(self.route)

    def kept(self, keep: Tensor) -> Self:
        here = keep.to(self.route.device)
        parts = [member.kept(here[self.route == number]) for number, member in enumerate(self.members)]
        return replace(self, members=tuple(parts), route=self.route[here])

    def view(self, rows: slice, *, out: Tensor | None = None) -> RoutedView:
        """The rows of each member, projected with its own head; ``out`` is not used."""
        views = [member.view(part) for member, part in zip(self.members, _parts(self, rows), strict=True)]
        return RoutedView(views, self.route[rows])

    @property
    def count(self) -> int:
        return len(self.members)


class RoutedView:
    """Rows in the order of ``route`` [n] from views that hold each member's rows in theirs."""

    def __init__(self, views: Sequence[View], route: Tensor) -> None:
        self.views, self.route = views, route
        self._at: dict[float, LogProbs] = {}

    @property
    def count(self) -> int:
        return len(self.views)

    def __getitem__(self, rows: slice) -> RoutedView:
        parts = _parts(self, rows)
        return RoutedView([view[part] for view, part in zip(self.views, parts, strict=True)], self.route[rows])

    def at(self, temperature: float) -> LogProbs:
        if temperature not in self._at:
            logp = torch.cat([view.at(temperature).logp for view in self.views])
            self._at[temperature] = _dense(logp[in_order(self.route).to(logp.device)])
        return self._at[temperature]


def in_order(route: Tensor) -> Tensor:
    """Where row i is [N] when all rows of member 0 stand first, then those of member 1, and so on."""
    return route.argsort(stable=True).argsort()


def _parts(routed: RoutedSignal | RoutedView, rows: slice) -> list[slice]:
    """Which of each member's own rows lie among ``rows``."""
    start, stop, _ = rows.indices(len(routed.route))
    before, inside = (
        torch.bincount(part, minlength=routed.count).tolist() for part in (routed.route[:start], routed.route[start:stop])
    )
    return [slice(first, first + count) for first, count in zip(before, inside, strict=True)]


def _dense(logp: Tensor) -> LogProbs:
    return LogProbs(logp=logp, ids=None, rest=logp.new_full((len(logp),), -torch.inf), support=Support.FULL)

"""What the parts of kdlib say to each other; imports torch alone.

Shape letters: B batch, S sequence, N scored positions (rows), n rows of one chunk, V vocabulary, K support size, D hidden
width, J sums. T is the temperature. The teacher is p, the student is q; log-probabilities and entropies are in nats.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from kdlib.head import Head

__all__ = [
    "Completion",
    "DenseView",
    "Head",
    "LogProbs",
    "Loss",
    "Objective",
    "Positions",
    "RowObjective",
    "Sampler",
    "SamplingParams",
    "SparseView",
    "StudentSignal",
    "Support",
    "Teacher",
    "TeacherSignal",
    "View",
    "feeds",
]


class Support(enum.Flag):
    """Where log-probabilities are known: ids drawn from one of the models, the K likeliest, or all of V."""

    SAMPLED_TEACHER = enum.auto()
    SAMPLED_STUDENT = enum.auto()
    TOPK = enum.auto()
    FULL = enum.auto()


def feeds(provides: Support, accepts: Support | None) -> bool:
    """Whether a teacher's support serves an objective; FULL satisfies TOPK, because the top k can be taken from it."""
    if accepts is None:
        return True
    usable = provides | Support.TOPK if Support.FULL in provides else provides
    return bool(usable & accepts)


@dataclass(frozen=True, kw_only=True)
class LogProbs:
    """Log-probabilities of n rows on one support.

    ``logp`` [n, K]; ``ids`` [n, K], [K] when shared by the rows, or None for 0..V-1; ``rest`` [n]: log of the mass outside the
    support (-inf when there is none).
    """

    logp: Tensor
    ids: Tensor | None
    rest: Tensor
    support: Support


class View(Protocol):
    """The log-probabilities of some rows, at the temperature the objective asks for."""

    def __getitem__(self, rows: slice) -> View: ...

    def at(self, temperature: float) -> LogProbs: ...


class DenseView:
    """log_softmax(logits / T) over the whole vocabulary; ``logits`` [n, V]. Each temperature is computed once.

    ``drawn`` [n]: on the student's side the log-prob with which each label was drawn, NaN for labels that were not; None when
    none was.
    """

    def __init__(self, logits: Tensor, *, drawn: Tensor | None = None) -> None:
        self.logits, self.drawn = logits, drawn
        self._at: dict[float, LogProbs] = {}

    def __getitem__(self, rows: slice) -> DenseView:
        return DenseView(self.logits[rows], drawn=None if self.drawn is None else self.drawn[rows])

    def at(self, temperature: float) -> LogProbs:
        if temperature not in self._at:
            logits = self.logits if temperature == 1.0 else self.logits / temperature
            logp = logits.log_softmax(-1)
            rest = logits.new_full((logits.shape[0],), -torch.inf)
            self._at[temperature] = LogProbs(logp=logp, ids=None, rest=rest, support=Support.FULL)
        return self._at[temperature]


class SparseView:
    """Stored log-probabilities [n, K] of ids [n, K], which exist at the temperature they were captured at and no other.

    Top-k entries and the mass outside are normalised together, so that 16-bit storage still gives a distribution.
    """

    def __init__(self, logp: Tensor, ids: Tensor, *, rest: Tensor | None, support: Support, temperature: float) -> None:
        self.logp, self.ids, self.rest, self.support, self.temperature = logp, ids, rest, support, temperature

    def __getitem__(self, rows: slice) -> SparseView:
        rest = None if self.rest is None else self.rest[rows]
        return SparseView(self.logp[rows], self.ids[rows], rest=rest, support=self.support, temperature=self.temperature)

    def at(self, temperature: float) -> LogProbs:
        if temperature != self.temperature:
            raise ValueError(
                f"truncated log-probs captured at temperature {self.temperature} cannot be re-tempered to {temperature}: "
                f"set the objective's temperature to {self.temperature}, or capture the signal again"
            )
        logp, n = self.logp.float() if self.logp.dtype.itemsize < 4 else self.logp, self.logp.shape[0]
        if self.support is not Support.TOPK:
            return LogProbs(logp=logp, ids=self.ids, rest=logp.new_full((n,), -torch.inf), support=self.support)
        rest = _log_outside(logp) if self.rest is None else self.rest.to(logp.dtype)
        total = torch.logaddexp(logp.logsumexp(-1), rest)
        return LogProbs(logp=logp - total[:, None], ids=self.ids, rest=rest - total, support=self.support)


def _log_outside(logp: Tensor) -> Tensor:
    """log(1 - sum_k exp logp_k) [n]; -inf where the support holds everything."""
    return torch.log(-torch.expm1(logp.logsumexp(-1).clamp(max=0.0)))


@dataclass(frozen=True, kw_only=True)
class TeacherSignal:
    """What a teacher says about N positions, in exactly one storage.

    Dense ``logits`` [N, V]; ``hidden`` [N, Dt] with ``head`` (the same, evaluated chunk by chunk so that [N, V] never exists);
    or ``logp`` [N, K] with ``ids`` [N, K] and optionally ``rest`` [N] (log mass outside) captured at ``temperature``.
    ``features`` {layer: [B, S, Dt]} only when an objective asked for layers.

    Raises ValueError when none or several storages are given, or when ``support`` contradicts the storage.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Head | None = None
    logp: Tensor | None = None
    ids: Tensor | None = None
    rest: Tensor | None = None
    support: Support = Support.FULL
    temperature: float = 1.0
    features: Mapping[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        stored = [x is not None for x in (self.logits, self.hidden, self.logp)]
        if sum(stored) != 1:
            raise ValueError("a TeacherSignal holds exactly one of logits, hidden + head, logp + ids")
        if (self.hidden is None) != (self.head is None) or (self.logp is None) != (self.ids is None):
            raise ValueError("hidden comes with head, and logp with ids")
        if (self.logp is None) != (self.support is Support.FULL):
            raise ValueError(
                f"a TeacherSignal stored as {'logp + ids' if self.logp is not None else 'dense'} cannot be {self.support}"
            )
        if self.logp is None and self.temperature != 1.0:
            raise ValueError("dense signals are stored at temperature 1; the objective divides by its own")

    def __len__(self) -> int:
        return next(len(x) for x in (self.logits, self.hidden, self.logp) if x is not None)

    @property
    def vocab_size(self) -> int | None:
        """V of a dense signal; None for ids, which say nothing about V."""
        if self.head is not None:
            return self.head.out_features
        return None if self.logits is None else self.logits.shape[-1]

    def view(self, rows: slice, *, out: Tensor | None = None) -> View:
        """The rows as a view; hidden states are projected here (into ``out`` [n, V] if given), so ask for a chunk at a time."""
        if self.logp is not None and self.ids is not None:
            return SparseView(self.logp, self.ids, rest=self.rest, support=self.support, temperature=self.temperature)[rows]
        if self.head is not None and self.hidden is not None:
            return DenseView(self.head(self.hidden[rows], out=out))
        assert self.logits is not None
        return DenseView(self.logits[rows] if self.logits.dtype.itemsize >= 4 else self.logits[rows].float())

    def at(self, rows: slice, temperature: float) -> LogProbs:
        """Log-probabilities of the rows; ValueError when truncated log-probs are asked for at another temperature."""
        return self.view(rows).at(temperature)

    def sliced(self, vocab_size: int) -> TeacherSignal:
        """The same signal over the first ``vocab_size`` entries: padding entries are cut before the softmax."""
        if self.logits is not None:
            return replace(self, logits=self.logits[..., :vocab_size])
        return self if self.head is None else replace(self, head=self.head.sliced(vocab_size))

    def kept(self, keep: Tensor) -> TeacherSignal:
        """The rows that ``keep`` names: [N] true or false, or indices in any order."""
        stored = {name: getattr(self, name) for name in ("logits", "hidden", "logp", "ids", "rest")}
        by_row = {name: x for name, x in stored.items() if x is not None and not (name == "ids" and x.ndim == 1)}
        return replace(self, **{name: x[keep.to(x.device)] for name, x in by_row.items()})

    def with_heads(self, change: Callable[[Head, Tensor], Head]) -> TeacherSignal:
        """The same signal with ``change(head, hidden)`` in the place of its head, if it has one."""
        return self if self.head is None or self.hidden is None else replace(self, head=change(self.head, self.hidden))


@dataclass(frozen=True, kw_only=True)
class Positions:
    """Which hidden states are scored, against what.

    ``index`` [N] into the flattened [B * S] hidden states; ``labels`` [N] the token that follows; ``sequence`` [N] the sequence
    a row belongs to; ``weight`` [N]; ``drawn`` [N] log-prob with which the label was drawn, NaN where it was not;
    ``teacher_index`` [N'] into the teacher's own [B * S'] where its input differs (``teacher_input_ids``). ``total``: what the
    rows' sum is divided by where that is not their number, as with a mean over all tokens of which a part is scored.
    ``uniform`` [N]: a number of [0, 1) drawn for each row, by which an objective takes some of them.

    ``tokens`` [N]: the token that is read at the position, where an objective asks for it.

    Where the teacher reads another tokenisation: ``other``, its own scored positions [N'] in its own [B * S']. A chunk is the
    least text that ends with a token on both sides: ``chunk`` [N] says to which chunk of 0..``chunks`` - 1 a row's label
    belongs, -1 for none, here of the student's tokens and in ``other`` of the teacher's. A chunk's rows follow one another.
    """

    index: Tensor
    labels: Tensor
    sequence: Tensor
    weight: Tensor | None = None
    drawn: Tensor | None = None
    uniform: Tensor | None = None
    teacher_index: Tensor | None = None
    total: int | None = None
    tokens: Tensor | None = None
    chunk: Tensor | None = None
    chunks: int = 0
    other: Positions | None = None

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device) -> Positions:
        """The same rows on ``device``."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in self._tensors().items()}
        return replace(self, **moved, other=None if self.other is None else self.other.to(device))

    def kept(self, keep: Tensor) -> Positions:
        """The rows where ``keep`` [N] is true."""
        assert self.chunk is None, "rows of an aligned chunk cannot be left out alone"
        assert self.total is None, "a total counts rows that would be left out"
        keep = keep.to(self.index.device)
        kept: dict[str, Any] = {name: x[keep] for name, x in self._tensors().items()}
        return replace(self, **kept)

    @property
    def denominator(self) -> int:
        """``total``, or the number of rows."""
        return len(self) if self.total is None else self.total

    def _tensors(self) -> dict[str, Tensor]:
        stored = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: x for name, x in stored.items() if isinstance(x, Tensor)}


@dataclass(frozen=True, kw_only=True)
class StudentSignal:
    """The student's hidden states at the scored positions [N, D], its head, and ``features`` {layer: [B, S, D]}."""

    hidden: Tensor
    head: Head
    positions: Positions
    features: Mapping[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Loss:
    """``sum`` over rows (nats; scalar, or [J] for J sums), ``count`` of rows, ``metrics`` {name: (sum, count)}."""

    sum: Tensor
    count: int
    metrics: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """A loss. ``accepts`` says which teacher supports feed it (None: needs no teacher), ``layers`` which features it reads."""

    @property
    def accepts(self) -> Support | None: ...

    @property
    def layers(self) -> tuple[int, ...]: ...

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None) -> Loss: ...


@runtime_checkable
class RowObjective(Protocol):
    """An objective that is a sum over rows: ``row`` gives [n] or [n, J] from views of q and p and the labels [n].

    ``same_vocabulary``: an id is one token in both models. ``large_blocks``: ``row`` wants many rows at a
    time, also on CPU, where elementwise work is faster on a few.
    """

    @property
    def accepts(self) -> Support | None: ...

    @property
    def same_vocabulary(self) -> bool: ...

    @property
    def large_blocks(self) -> bool: ...

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor: ...


class Teacher(Protocol):
    """Where a TeacherSignal comes from."""

    @property
    def provides(self) -> Support: ...

    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal: ...


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How completions are drawn. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 keep everything.

    ``max_tokens`` counts new tokens, the stop token included; generation ends after any of ``stop_ids``. Without ``log_probs``
    an engine need not compute them, and those of a Completion may be NaN.
    """

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_ids: tuple[int, ...] = ()
    log_probs: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if self.temperature < 0 or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}: "
                "temperature and top_k are 0 or more, top_p is above 0 and at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Generated token ids, the stop token included, and ``logp`` of each under the distribution it was drawn from (nats).

    That distribution is after temperature, top_k and top_p; for a greedy choice it is the model's own at temperature 1.
    ``finish`` is "stop" after a stop token and "length" at max_tokens or at the end of the model's context.
    """

    ids: list[int]
    logp: list[float]
    finish: Literal["stop", "length"]


class Sampler(Protocol):
    """Token ids in, token ids out."""

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams, *, seeds: Sequence[int]) -> list[Completion]:
        """One completion for each prompt, in order; what is drawn depends on the prompt's own seed, not on its neighbours."""
        ...

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """log q(x_t | x_<t) at temperature 1 for t = 1..S-1 of each sequence: S - 1 numbers, nats."""
        ...

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the weights; names and shapes are those of the transformers model."""
        ...

    def close(self) -> None:
        """Ends what was started."""
        ...

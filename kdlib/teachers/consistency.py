"""Models with different tokenizers as one teacher, weighed by how far they agree, token by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kdlib.kernels.outcomes import log_total
from kdlib.teachers.composed import _Composed, _dense
from kdlib.teachers.hf import HFTeacher
from kdlib.teachers.voters import Spelled, Voter, Votes
from kdlib.tokenizers.spans import keeps_spaces
from kdlib.types import LogProbs, Positions, Support, TeacherSignal, View

_POWER = 5.0
_EPS = 1e-12

Score = Literal["rbf", "linear", "power", "none"]


class ConsistencyEnsemble:
    """The ``main`` model's next-token distribution, corrected by ``assistants`` of other tokenizers (CoRE, EACL 2026).

    Every assistant reads the same text in tokens of its own. Where one of these ends at the byte at which the main's row
    stands, its ``top_k`` likeliest next tokens are taken into the main's vocabulary (``token_projection``): to the token of the
    same bytes, else to the first piece that the main's tokenizer splits them into; tokens that become none count nothing.
    On the support (the main's ``top_k``, and what the assistants' became), with p_0 the main, p_i each assistant that stands
    there and p* the mean of all of these,

        s_m(v) = (e^(-beta d) - e^-beta) / (1 - e^-beta),  d = |p_m(v) - p*(v)|,
        w_m = sum_v s_m(v) / (H(p_m) + 1e-12),  w_0 at least the sum of the others, then all normalised to sum to 1,
        p(v) ~ w_0 p_0(v) + sum_i w_i s_i(v) p_i(v),  s_i rescaled to mean 1 where it is not 0.

    ``consistency``: rbf as above, linear (s = 1 - d), power (s = (1 - d)^5), or none (s = 1: the entropies alone weigh). H is
    of p_m normalised on the support, in nats. Off the support the mass of each model there, times its weight, is spread as the
    main spreads its own; the whole is normalised. Where no assistant stands, it is the main alone. At a temperature the mixture
    is tempered.

    The published code knows of the top k alone: it renormalises each to 1, does not normalise the mixture, and takes p_0 as 0
    off the main's. Its rule that the main's token wins over one that begins alike is for greedy decoding, and not taken over.

    The text of a row is what the main's tokens spell up to the last scored one, without special tokens at its ends; those
    within it, as chat templates have, are read as they are written: of a conversation the assistants read the main's rendered
    text, as plain text. An assistant says nothing in texts that its tokenizer changes (one that normalises).

    ``tokenizer`` and ``vocab_size`` are the main's. Raises ValueError for teachers that are no HFTeacher or have no tokenizer,
    for tokenizers whose tokens leave out bytes of a text, and for options out of range.
    """

    provides = Support.FULL

    def __init__(
        self,
        main: HFTeacher,
        assistants: Sequence[HFTeacher],
        *,
        top_k: int = 10,
        consistency: Score = "rbf",
        beta: float = 2.0,
    ) -> None:
        if not assistants:
            raise ValueError("ConsistencyEnsemble needs a main teacher and others: give at least two teachers")
        self.teachers = (main, *assistants)
        smallest = min(map(_cut, self.teachers))
        if not 1 <= top_k <= smallest:
            raise ValueError(f"ConsistencyEnsemble.top_k is between 1 and the smallest vocabulary's {smallest}, not {top_k}")
        self.agreement = Agreement(top_k=top_k, consistency=consistency, beta=beta)
        self._spelled = Spelled(self.tokenizer)
        self._voters = [Voter(assistant, main) for assistant in assistants]

    @property
    def name(self) -> str:
        return " + ".join(teacher.name for teacher in self.teachers)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        assert self.teachers[0].tokenizer is not None
        return self.teachers[0].tokenizer

    @property
    def vocab_size(self) -> int | None:
        return self.teachers[0].vocab_size

    @vocab_size.setter
    def vocab_size(self, size: int | None) -> None:
        self.teachers[0].vocab_size = size

    def place(self, device: torch.device) -> None:
        """Moves all models, as HFTeacher.place does."""
        for teacher in self.teachers:
            teacher.place(device)

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Any], positions: Positions, layers: tuple[int, ...] = ()) -> TeacherSignal:
        """The main's hidden states and the assistants' votes [N, top_k] at the positions; ValueError for ``layers``."""
        if layers:
            raise ValueError("an ensemble has no hidden layers of its own: an objective on layers needs a single teacher")
        main, texts = self.teachers[0].signal(batch, positions), list(self._spelled.texts(batch, positions))
        options: dict[str, Any] = {"n": len(main), "k": self.agreement.top_k, "device": positions.index.device}
        votes = tuple(voter.votes(texts, **options) for voter in self._voters)
        return ConsistencySignal(members=(main,), votes=votes, agreement=self.agreement)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How models that speak of the same tokens are weighed and mixed; the options of ConsistencyEnsemble."""

    top_k: int
    consistency: Score
    beta: float

    def __post_init__(self) -> None:
        if self.consistency not in ("rbf", "linear", "power", "none"):
            raise ValueError(f"ConsistencyEnsemble.consistency is rbf, linear, power or none, not {self.consistency!r}")
        if not 0 < self.beta < math.inf:
            raise ValueError(f"ConsistencyEnsemble.beta must be above 0, not {self.beta}: consistency none scores no tokens")

    def mixed(self, main: Tensor, votes: Sequence[Votes]) -> Tensor:
        """log p [n, V] from the main's [n, V] and what the assistants say of the same rows."""
        V = main.shape[-1]
        named = [torch.where(vote.ids < V, vote.ids, -1) for vote in votes]
        asked = torch.cat([main.topk(min(self.top_k, V)).indices, *named], -1)
        new = (asked >= 0) & ~(asked[:, :, None] == asked[:, None, :]).tril(-1).any(-1)
        ids = torch.where(new, asked, asked[:, :1])  # [n, C]: the support, each token once where ``new``
        logp = torch.stack([main.gather(-1, ids), *(vote.at(ids).log().to(main.dtype) for vote in votes)])
        logp = logp.masked_fill(~new, -torch.inf)  # [1 + A, n, C]
        scores, weights = self._weighed(logp.exp(), new)
        own_tail = log_total(main.scatter(-1, ids, -torch.inf))
        tails = torch.stack([own_tail, *(vote.tail.log().to(main.dtype) for vote in votes)])
        tail = (tails + weights.log()).logsumexp(0)
        spread = torch.where(own_tail > -torch.inf, tail - own_tail, 0.0)
        inside = (logp + (weights[..., None] * scores).log()).logsumexp(0)
        inside = torch.where(new, inside, inside[:, :1])  # so that one id is never written with two values
        return (main + spread[:, None]).scatter(-1, ids, inside).log_softmax(-1)

    def _weighed(self, p: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """What the models' p [1 + A, n, C] on the support are multiplied with: scores [1 + A, n, C] and weights [1 + A, n]."""
        stands = (p.sum(-1) > 0).to(p.dtype)  # not an assistant without a boundary here, or none of whose tokens has a place
        mean = p.sum(0) / stands.sum(0)[:, None]
        scores = self._scores((p - mean).abs()) * new * stands[..., None]
        sums, own = scores.sum(-1), p / p.sum(-1, keepdim=True).clamp(min=_EPS)
        weights = sums / (torch.special.entr(own).sum(-1) + _EPS)
        weights[0] = torch.maximum(weights[0], weights[1:].sum(0))
        scores = scores * ((scores > 0).sum(-1) / sums.clamp(min=_EPS))[..., None]
        scores[0] = 1.0
        return scores, weights / weights.sum(0)

    def _scores(self, d: Tensor) -> Tensor:
        if self.consistency == "rbf":
            least = math.exp(-self.beta)
            return ((-self.beta * d).exp() - least) / (1.0 - least)
        if self.consistency == "none":
            return torch.ones_like(d)
        return (1.0 - d) ** (_POWER if self.consistency == "power" else 1.0)


@dataclass(frozen=True, kw_only=True)
class ConsistencySignal(_Composed):
    """The main's signal, as the one of the ``members``, and the assistants' ``votes`` about the same rows."""

    votes: tuple[Votes, ...]
    agreement: Agreement

    def __len__(self) -> int:
        return len(self.members[0])

    def kept(self, keep: Tensor) -> Self:
        main = self.members[0].kept(keep)
        votes = tuple(vote[keep.to(vote.ids.device)] for vote in self.votes)
        return replace(self, members=(main,), votes=votes)

    def view(self, rows: slice, *, out: Tensor | None = None) -> ConsistencyView:
        """The rows, of which the main's are projected here."""
        main = self.members[0].view(rows, out=out)
        return ConsistencyView(main, [vote[rows] for vote in self.votes], self.agreement)


class ConsistencyView:
    """The mixture of some rows, over the main's whole vocabulary."""

    def __init__(self, main: View, votes: Sequence[Votes], agreement: Agreement) -> None:
        self.main, self.votes, self.agreement = main, votes, agreement
        self._mixed: Tensor | None = None
        self._at: dict[float, LogProbs] = {}

    def __getitem__(self, rows: slice) -> ConsistencyView:
        return ConsistencyView(self.main[rows], [vote[rows] for vote in self.votes], self.agreement)

    def at(self, temperature: float) -> LogProbs:
        if self._mixed is None:
            self._mixed = self.agreement.mixed(self.main.at(1.0).logp, self.votes)
        if temperature not in self._at:
            tempered = self._mixed if temperature == 1.0 else (self._mixed / temperature).log_softmax(-1)
            self._at[temperature] = _dense(tempered)
        return self._at[temperature]


def _cut(teacher: HFTeacher) -> int:
    """The vocabulary of a teacher without padding entries."""
    if not isinstance(teacher, HFTeacher):
        raise ValueError(f"ConsistencyEnsemble is made of models in this process, {type(teacher).__name__} is none")
    if teacher.tokenizer is None:
        raise ValueError(f"ConsistencyEnsemble needs the tokenizer of {teacher.name}: give HFTeacher(model, tokenizer=...)")
    if not keeps_spaces(teacher.tokenizer):
        raise ValueError(
            f"the tokens of {teacher.name} leave out the spaces between words, so that no text can be followed in them: "
            "use a model with a byte-level or SentencePiece tokenizer"
        )
    if teacher.vocab_size is None:
        teacher.vocab_size = len(teacher.tokenizer)
    return teacher.vocab_size

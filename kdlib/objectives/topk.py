"""Objectives that look at the teacher's likeliest tokens: decoupled top-k and Plackett-Luce ranking."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.kernels.outcomes import expectation, kl, log_total, outcomes, top_k
from kdlib.objectives.base import Divergence, RowObjective
from kdlib.types import LogProbs, Support, View


@dataclass(frozen=True, kw_only=True)
class DecoupledTopK(Divergence):
    """KL(Bern(P) || Bern(Q)) + P KL(p_tau(.|top k) || q_tau(.|top k)), P and Q the mass of the teacher's top k.

    ``tau`` tempers only the two conditionals, so truncated signals serve at any tau (LFM2, arXiv 2511.23404). At tau = 1 it
    equals forward KL over the K + 1 outcomes. Raises ValueError when the signal holds fewer than ``k`` ids.
    """

    k: int = 32
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1 or self.tau <= 0:
            raise ValueError(f"DecoupledTopK needs k >= 1 and tau > 0, not {self.k} and {self.tau}")

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        assert p is not None
        logq, logp = outcomes(q.at(self.temperature), top_k(p.at(self.temperature), self.k))
        return self.factor * self.between(logp, logq)

    def between(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Over K + 1 outcomes, the last of which is the mass outside."""
        inside_p, inside_q = logp[:, :-1], logq[:, :-1]
        mass_p, mass_q = log_total(inside_p), log_total(inside_q)
        binary = kl(torch.stack([mass_p, logp[:, -1]], -1), torch.stack([mass_q, logq[:, -1]], -1))
        return binary + mass_p.exp() * kl(self._conditional(inside_p), self._conditional(inside_q))

    def _conditional(self, inside: Tensor) -> Tensor:
        """Log-probabilities given the top k; uniform without mass to condition on (the binary term is infinite there)."""
        some = (inside > -torch.inf).any(-1, keepdim=True)
        return (torch.where(some, inside, 0.0) / self.tau).log_softmax(-1)


@dataclass(frozen=True, kw_only=True)
class PlackettLuce(RowObjective):
    """sum_k a_k [-log q(pi_k) + log of the q-mass not ranked before k].

    pi = the label, then tokens by falling teacher probability; a = softmax(teacher logits / tau) at the ranked tokens (PLD,
    arXiv 2506.12542). The ranking is cut at ``top_k`` tokens; all others stay unranked but count in the mass, so
    ``top_k = V`` is the paper's loss. ``label_first=False`` ranks by the teacher alone and then also takes top-k signals.
    Raises ValueError when the signal holds fewer than ``top_k`` ids.
    """

    top_k: int = 32
    tau: float = 1.0
    label_first: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k < 1 or self.tau <= 0:
            raise ValueError(f"PlackettLuce needs top_k >= 1 and tau > 0, not {self.top_k} and {self.tau}")

    @property
    def accepts(self) -> Support | None:  # type: ignore[override]
        return Support.FULL if self.label_first else Support.FULL | Support.TOPK

    @property
    def reads_labels(self) -> bool:
        return self.label_first

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        assert p is not None
        ranked = self._ranking(p.at(self.temperature * self.tau), labels)
        logq, logp = outcomes(q.at(self.temperature), ranked)
        # torch's logcumsumexp has NaN gradients for -inf; a very small number weighs as little
        finite = logq.clamp(min=torch.finfo(logq.dtype).min / 4)
        unranked = finite.flip(-1).logcumsumexp(-1).flip(-1)[:, :-1]
        logq = logq[:, :-1]
        surprise = torch.where(logq > -torch.inf, unranked - logq, torch.inf)
        return self.factor * expectation(logp[:, :-1], surprise)

    def _ranking(self, p: LogProbs, labels: Tensor) -> LogProbs:
        k = min(self.top_k, p.logp.shape[-1]) if p.ids is None else self.top_k
        if not self.label_first:
            return top_k(p, k)
        ids = p.logp.scatter(-1, labels[:, None], torch.inf).topk(k, dim=-1).indices
        logp = p.logp.gather(-1, ids)
        return LogProbs(logp=logp, ids=ids, rest=p.rest, support=Support.TOPK)

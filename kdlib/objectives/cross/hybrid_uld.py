"""Hybrid ULD (GOLD, TRL): tokens of both vocabularies are compared with each other, the rest by rank."""

# Annotations are evaluated here (no future import): see objectives/base.py.

from dataclasses import dataclass

import torch
from torch import Tensor

from kdlib.kernels.outcomes import log_total
from kdlib.objectives.cross.base import CrossTokenizerObjective, Pair, Tables, tables_of
from kdlib.objectives.cross.merged import Start, compared, places_of
from kdlib.objectives.cross.rows import sum_of_no_rows, teacher_of
from kdlib.objectives.cross.uld import ranked_distance
from kdlib.objectives.kl import GeneralizedJSD
from kdlib.types import Loss, StudentSignal, TeacherSignal, View


@dataclass(frozen=True, kw_only=True)
class HybridULD(CrossTokenizerObjective):
    """Sum over chunks of w_m JSD_beta(p, q) on what both models can say alike + w_u sum_i |q_(i) - p_(i)| on the rest, by rank.

    Where a chunk begins, the text goes on with (a) the chunk itself, whose probability is the product over its tokens on each
    side; (b) a token that spells the same bytes in both vocabularies and is the first of the chunk on neither side; or (c)
    anything else. ``GeneralizedJSD`` compares p and q over all of (a), (b) and the mass of (c) as one outcome, so it is a
    divergence: never negative, 0 where both agree. What (c) is made of on either side is compared as in ``ULD``: tokens of one
    vocabulary alone, the first token of a longer chunk with another end, and a token that the other side's chunk begins with.

    TRL compares sub-vectors that do not sum to one, whose "divergence" can be negative, matches tokens by the vocabulary's own
    spelling, and merges chunks as ``ULD`` describes. With one tokenizer on both sides this is ``GeneralizedJSD``.

    Options beside those of all objectives between two tokenizers:

    beta: of the generalised JSD, m = beta p + (1 - beta) q; 0 is KL(p || q), which is infinite where all tokens of the student
        are shared and not all of the teacher's; 1 is KL(q || p).
    matched_weight, unmatched_weight: w_m and w_u; left out, w_m is the share of the teacher's vocabulary that both have, and
        w_u is 1 less that share, as in TRL.
    temperature: divides both models' logits.

    TRL trains with it alone (``cross_entropy`` 0), on the student's own samples. Raises ValueError for options out of range.
    """

    needs = ("shared",)

    beta: float = 0.5
    matched_weight: float | None = None
    unmatched_weight: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"HybridULD.beta must be between 0 and 1, not {self.beta}")
        for name in ("matched_weight", "unmatched_weight"):
            if getattr(self, name) is not None and getattr(self, name) < 0:
                raise ValueError(f"HybridULD.{name} must be 0 or more, not {getattr(self, name)}")
        if self.matched_weight == 0 and self.unmatched_weight == 0:
            raise ValueError("HybridULD: both weights are 0: give matched_weight, unmatched_weight or neither")
        if not self.temperature > 0:
            raise ValueError(f"HybridULD.temperature must be above 0, not {self.temperature}")

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None, tables: Tables | None = None) -> Loss:
        teacher, shared = teacher_of(self, teacher), tables_of(self, tables).shared
        assert shared is not None and teacher.vocab_size is not None
        if not student.positions.chunks:
            return Loss(sum=sum_of_no_rows(student), count=0)
        mine, theirs = _Vocabulary.of(shared[0], student.head.out_features), _Vocabulary.of(shared[1], teacher.vocab_size)
        weights = self._weights(len(shared[0]) / teacher.vocab_size)

        def compare(q: Start, p: Start) -> Tensor:
            begins = torch.stack([mine.pair[q.first], theirs.pair[p.first]], -1)
            return self._compare(_split(q, mine, begins), _split(p, theirs, begins.flip(-1)), weights)

        places = places_of(student, teacher, alignment="chunks", log_probs=self._log_probs)
        return Loss(sum=compared(places, compare, log_probs=self._log_probs).sum(), count=len(places))

    def _compare(self, q: Pair, p: Pair, weights: tuple[float, float]) -> Tensor:
        """[n]; a term of weight 0, which may be infinite, is left out."""
        (alike_q, rest_q), (alike_p, rest_p) = q, p
        if weights[0] == 0.0:
            return weights[1] * ranked_distance(rest_q.exp(), rest_p.exp())
        matched = weights[0] * GeneralizedJSD(beta=self.beta).between(alike_p.to(alike_q.dtype), alike_q)
        return matched if weights[1] == 0.0 else matched + weights[1] * ranked_distance(rest_q.exp(), rest_p.exp())

    def _log_probs(self, view: View) -> Tensor:
        return view.at(self.temperature).logp

    def _weights(self, share: float) -> tuple[float, float]:
        matched = share if self.matched_weight is None else self.matched_weight
        return matched, 1.0 - share if self.unmatched_weight is None else self.unmatched_weight


@dataclass(frozen=True, kw_only=True)
class _Vocabulary:
    """One side's tokens: ``shared`` [M] those that both have, ``alone`` [V - M] the others, ``pair`` [V] where each is in
    ``shared``, M for the others.
    """

    shared: Tensor
    alone: Tensor
    pair: Tensor

    @classmethod
    def of(cls, shared: Tensor, size: int) -> "_Vocabulary":
        places = torch.arange(len(shared), device=shared.device)
        pair = places.new_full((size,), len(shared)).scatter(0, shared, places)
        alone = pair.argsort(descending=True, stable=True)[: size - len(shared)]  # to list them would wait for the device
        return cls(shared=shared, alone=alone, pair=pair)


def _split(start: Start, tokens: _Vocabulary, begins: Tensor) -> Pair:
    """log-masses of (b), nothing, (a) and (c) [n, M + 3], and of what (c) is made of [n, V - M + 2].

    ``begins`` [n, 2]: which shared token the chunk begins with here, and on the other side; M for none.
    """
    none, M = torch.full_like(start.logp[:, :1], -torch.inf), len(tokens.shared)
    there = start.logp.gather(-1, torch.nn.functional.pad(tokens.shared, (0, 1))[begins[:, 1:]])
    there = torch.where((begins[:, 1:] == M) | (begins[:, 1:] == begins[:, :1]), none, there)
    alone = start.logp[:, tokens.alone].masked_fill(tokens.alone == start.first[:, None], -torch.inf)
    rest = torch.cat([alone, start.log_otherwise[:, None], there], -1)
    alike = torch.cat([start.logp[:, tokens.shared], none, start.log_chunk[:, None], log_total(rest)[:, None]], -1)
    return alike.scatter(-1, begins, -torch.inf), rest

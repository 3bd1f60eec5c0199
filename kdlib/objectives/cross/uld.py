"""Universal logit distillation (ULD, arXiv 2402.12030): probabilities are compared by rank, whatever the tokens are."""

# Annotations are evaluated here (no future import): see objectives/base.py.

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kdlib.objectives.cross.base import CrossTokenizerObjective, Tables
from kdlib.objectives.cross.merged import Start, compared, places_of, total_places
from kdlib.objectives.cross.rows import sum_of_no_rows, teacher_of
from kdlib.types import Loss, Positions, StudentSignal, Support, TeacherSignal, View


@dataclass(frozen=True, kw_only=True)
class ULD(CrossTokenizerObjective):
    """Sum over places of sum_i |q_(i) - p_(i)|, both distributions sorted from the largest, the shorter one padded with zeros.

    That is the cost of moving the mass of q onto p where any two tokens are one apart, so a student with the right
    probabilities on the wrong tokens has no loss: add cross-entropy.

    A place is a chunk, the least text that ends with a token on both sides. Where it is several tokens of a model, the mass of
    the first is split by the chain rule into that of the whole chunk and that of the first token with another continuation:
    V + 1 outcomes that sum to one, with gradients at all tokens of the chunk. TRL's merging "observed" pairs each token with
    the prediction after it, "bayesian" takes the last token's distribution times the probability of those before it; both sum
    to less than one, so that what is compared by rank depends on how long a chunk is.

    Options beside those of all objectives between two tokenizers:

    alignment: chunks, or positional as in the paper's code: the t-th token of an answer beside the t-th of the teacher's, up to
        the shorter one, whatever their text; then the sum is divided by the number of these pairs.
    temperature: divides both models' logits.
    top_k: compare so many of the largest probabilities alone; 0 takes all. Positional with ``top_k`` needs no more than the
        teacher's top k.

    The default ``weight`` is that of the paper's code, which averages each answer by itself first. Raises ValueError for
    options out of range and for a teacher's signal of less than ``top_k``.
    """

    weight: float = 1.5
    alignment: Literal["chunks", "positional"] = "chunks"
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment not in ("chunks", "positional"):
            raise ValueError(f"ULD.alignment is chunks or positional, not {self.alignment!r}")
        if not self.temperature > 0:
            raise ValueError(f"ULD.temperature must be above 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"ULD.top_k must be 0 (all) or more, not {self.top_k}")

    @property
    def accepts(self) -> Support | None:  # type: ignore[override]
        """A top-k signal does not say how probable the tokens of a chunk are."""
        return Support.FULL | Support.TOPK if self.alignment == "positional" and self.top_k else Support.FULL

    def total(self, positions: Positions) -> int:
        return total_places(positions, self.alignment)

    @property
    def signal_temperature(self) -> float:
        return self.temperature

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None, tables: Tables | None = None) -> Loss:
        teacher = teacher_of(self, teacher)
        if teacher.logp is not None and teacher.logp.shape[-1] < self.top_k:
            raise ValueError(
                f"ULD.top_k is {self.top_k}, the teacher's signal holds {teacher.logp.shape[-1]}: capture more, or lower it"
            )
        places = places_of(student, teacher, alignment=self.alignment, log_probs=self._log_probs)
        if not len(places):
            return Loss(sum=sum_of_no_rows(student), count=0)
        found = compared(places, self._distance, log_probs=self._log_probs)
        return Loss(sum=found.sum(), count=len(places))

    def _log_probs(self, view: View) -> Tensor:
        return view.at(self.temperature).logp

    def _distance(self, q: Start, p: Start) -> Tensor:
        return ranked_distance(q.probabilities(), p.probabilities(), top=self.top_k)


def ranked_distance(q: Tensor, p: Tensor, *, top: int = 0) -> Tensor:
    """sum_i |q_(i) - p_(i)| [n] of q [n, K] and p [n, K'], each sorted from the largest; of the ``top`` largest, 0 for all."""
    a, b = (_ranked(x, top) for x in (q, p.to(q.dtype)))
    width = max(a.shape[-1], b.shape[-1])
    a, b = (torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in (a, b))
    return (a - b).abs().sum(-1)


def _ranked(x: Tensor, top: int) -> Tensor:
    if 0 < top < x.shape[-1]:
        return x.topk(top, dim=-1).values
    return x.sort(dim=-1, descending=True).values

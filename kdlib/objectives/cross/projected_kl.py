"""The student's next-token distribution in the teacher's vocabulary, where both are about to begin the same text."""

# Annotations are evaluated here (no future import): see objectives/base.py.

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from kdlib.kernels import linear_objective
from kdlib.kernels.outcomes import outcomes, top_k
from kdlib.objectives.base import RowObjective
from kdlib.objectives.cross.alm import DIVERGENCES
from kdlib.objectives.cross.base import CrossTokenizerObjective, Tables, tables_of
from kdlib.objectives.cross.likelihoods import first_rows
from kdlib.objectives.cross.rows import rows_of_student, teacher_of
from kdlib.types import LogProbs, Loss, StudentSignal, Support, TeacherSignal, View


@dataclass(frozen=True, kw_only=True)
class ProjectedKL(CrossTokenizerObjective):
    """Sum over chunks of p(R) KL(p(.|R) || q'(.|R)), q'(w) = sum_v q(v) W[v, w], at the first token of each chunk.

    There both models have read the same text and say what comes next: q over the student's V tokens, p over the teacher's V'.
    W (``token_projection``) says what each token of the student becomes in the teacher's vocabulary: the token of the same
    bytes, or the pieces that the teacher splits it into, mostly the first. R are the tokens that some token of the student
    becomes. What the teacher gives to others, and the student to tokens that become none, cannot be compared; both
    sides are renormalised on R, and the row counts by how much of the teacher can be compared, p(R). With one tokenizer it is
    the forward KL of every row.

    X-Token (arXiv 2605.21699) averages log-probs over the rows of a chunk, which is no distribution over next tokens, and does
    not renormalise q', which pulls on tokens outside R. Here every row is one.

    Options beside those of all objectives between two tokenizers:

    divergence: kl is KL(teacher || student), or reverse_kl, jsd, total_variation.
    temperature: divides both models' logits, before the projection.
    top_k: compare the teacher's k likeliest tokens of R and the mass of the others; 0 compares all of them.

    Raises ValueError for options out of range, and for a projection of vocabularies of other sizes than the heads'.
    """

    needs = ("projection",)

    divergence: Literal["kl", "reverse_kl", "jsd", "total_variation"] = "kl"
    temperature: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"ProjectedKL.divergence is one of {', '.join(DIVERGENCES)}, not {self.divergence!r}")
        if not self.temperature > 0:
            raise ValueError(f"ProjectedKL.temperature must be above 0, not {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"ProjectedKL.top_k must be 0 (all tokens) or more, not {self.top_k}")

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None, tables: Tables | None = None) -> Loss:
        teacher, positions = teacher_of(self, teacher), student.positions
        assert positions.chunk is not None
        assert positions.other is not None and positions.other.chunk is not None
        projection = tables_of(self, tables).projection
        assert projection is not None and teacher.vocab_size is not None
        if len(projection[0]) != student.head.out_features:
            raise ValueError(
                f"the projection is of {len(projection[0])} tokens, the student's head has {student.head.out_features}: "
                "give token_projection the sizes of both heads"
            )
        mine = rows_of_student(student, first_rows(positions.chunk, positions.chunks))
        theirs = teacher.kept(first_rows(positions.other.chunk, positions.chunks))
        links = _links(*projection, teacher.vocab_size)
        found = linear_objective(mine, theirs, ProjectedRows(options=self, links=links, temperature=self.temperature))
        return Loss(
            sum=found.sum, count=self.total(positions), metrics={"projected_kl": (found.sum.detach(), positions.chunks)}
        )


@dataclass(frozen=True, kw_only=True)
class Links:
    """W without its zeros: token ``of`` [E] of the student becomes ``reached[place]`` [E] with ``share`` [E] (float64);
    ``reached`` [R] are the teacher's tokens that some token becomes.
    """

    of: Tensor
    place: Tensor
    share: Tensor
    reached: Tensor


@dataclass(frozen=True, kw_only=True)
class ProjectedRows(RowObjective):
    """p(R) D(p(.|R), q'(.|R)) of each row."""

    accepts = Support.FULL

    options: ProjectedKL
    links: Links

    @property
    def same_vocabulary(self) -> bool:
        return False

    def row(self, q: View, p: View | None, labels: Tensor) -> Tensor:
        assert p is not None
        teacher = p.at(self.temperature)
        inside = teacher.logp.index_select(-1, self.links.reached)
        comparable = inside.logsumexp(-1)
        theirs = replace(teacher, logp=inside - comparable[:, None])
        if 0 < self.options.top_k < len(self.links.reached):
            theirs = top_k(theirs, self.options.top_k)
        logq, logp = outcomes(self._projected(q.at(self.temperature)), theirs)
        return comparable.exp() * DIVERGENCES[self.options.divergence].between(logp, logq)

    def _projected(self, q: LogProbs) -> LogProbs:
        """log q'(.|R) [n, R]; in float64, because float32 has no probabilities below e^-103."""
        links, n = self.links, len(q.logp)
        parts = q.logp.double().exp().gather(-1, links.of.expand(n, -1)) * links.share
        mass = parts.new_zeros(n, len(links.reached)).scatter_add(-1, links.place.expand(n, -1), parts)
        least = torch.finfo(mass.dtype).tiny
        logq = mass.clamp(min=least).log() - mass.sum(-1, keepdim=True).clamp(min=least).log()
        return replace(q, logp=logq.to(q.logp.dtype))


@lru_cache(maxsize=2)  # tensors are known by their identity: the tables of a run are made once
def _links(ids: Tensor, weights: Tensor, vocab_size: int) -> Links:
    of, piece = weights.nonzero(as_tuple=True)
    reached, place = ids[of, piece].unique(return_inverse=True)
    if len(reached) and int(reached[-1]) >= vocab_size:
        raise ValueError(
            f"the projection has the teacher's token {int(reached[-1])}, its head {vocab_size}: "
            "give token_projection the sizes of both heads"
        )
    share = weights[of, piece].double()
    share = share / share.new_zeros(len(ids)).index_add(0, of, share)[of]
    return Links(of=of, place=place, share=share, reached=reached)

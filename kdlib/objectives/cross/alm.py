"""Approximate likelihood matching (ALM, arXiv 2503.20083): both models find each stretch of text as likely."""

# Annotations are evaluated here (no future import): see objectives/base.py.

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from kdlib.objectives.base import Divergence
from kdlib.objectives.cross.base import CrossTokenizerObjective, Tables, tables_of
from kdlib.objectives.cross.likelihoods import (
    chunk_sums,
    first_rows,
    next_rows,
    student_likelihoods,
    student_likelihoods_and_mass,
    teacher_likelihoods,
    teacher_likelihoods_and_mass,
)
from kdlib.objectives.kl import ForwardKL, GeneralizedJSD, ReverseKL
from kdlib.objectives.total_variation import TotalVariation
from kdlib.types import Loss, Positions, StudentSignal, Support, TeacherSignal


@dataclass(frozen=True, kw_only=True)
class ALM(CrossTokenizerObjective):
    """Sum over chunks of T D((e^(L_p/T), 1 - e^(L_p/T)) || (e^(L_q/T), 1 - e^(L_q/T))), T the temperature.

    L is the log-likelihood of the chunk's text under teacher p or student q: the sum of the log-probs of its tokens, which cut
    it in different ways. The factor T, which the paper has not, keeps the gradient from falling as 1 / T.

    ``debias`` (outcome-chunk debiasing): a token can end a text that could go on within a word, and tokenizers differ in where
    they do. So the end of the chunk is part of what is compared: L + log sum_v p(v | text up to its end) over the tokens v that
    begin with white space or are special, on both sides. It is left out where on either side no scored row follows.

    ``threshold``: neighbouring chunks are taken together until the teacher gives such tokens a probability above it; what
    follows a gap or is of another sequence starts anew. The value of a merged chunk counts once for each of the chunks it is
    made of, so that the count is that of ``positions``, known before the teacher is asked, and the mean does not depend on how
    a step is split into micro-batches; the paper's mean is over merged chunks.

    The side term "hidden" is |h_s - h_t|^2 / |h_t|^2 of the last hidden states at the last token of each chunk, the student's
    projected where the widths differ; of chunks as they are before merging, and 0 where no scored row follows on both sides.
    tokenkit divides each channel by its mean square in the batch instead, which depends on the micro-batch.

    Options beside those of all objectives between two tokenizers:

    divergence: kl, KL(teacher || student), 0 where both agree; cross_entropy is the same without the teacher's entropy
        (tokenkit's default: equal gradients), reverse_kl, total_variation |e^x - e^y|, or jsd.
    temperature: divides log-likelihoods. At 1, chunks that neither model expects hardly count; at 100, as in the paper's code,
        they count as others do. inf is the limit (of total_variation: the distance of the log-likelihoods).
    threshold: teacher's probability of white space or special tokens above which a chunk ends; 0 merges nothing.
    debias: compare the end of a chunk as well.
    hidden: weight of the side term on hidden states; 0 leaves it out.

    With ``debias`` false, ``threshold`` 0 and ``hidden`` 0 the log-probs of the teacher's tokens suffice (prompt log-probs of a
    server). Log-likelihoods above -eps (1.2e-7 in float32) count as -eps, without gradient: they round to 0, where the KL of a
    teacher that is not certain is infinite. Raises ValueError for options out of range, and when
    the tables or hidden states that the options need are missing.
    """

    divergence: Literal["kl", "reverse_kl", "cross_entropy", "total_variation", "jsd"] = "kl"
    temperature: float = 100.0
    threshold: float = 0.1
    debias: bool = True
    hidden: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.divergence not in (known := (*DIVERGENCES, "cross_entropy")):
            raise ValueError(f"ALM.divergence is one of {', '.join(known)}, not {self.divergence!r}")
        if not self.temperature > 0:
            raise ValueError(f"ALM.temperature must be above 0, not {self.temperature}")
        if self.divergence == "cross_entropy" and math.isinf(self.temperature):
            raise ValueError("ALM.cross_entropy has no limit at temperature inf: set divergence to kl")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"ALM.threshold is a probability, at least 0 and below 1, not {self.threshold}")
        if self.hidden < 0:
            raise ValueError(f"ALM.hidden must be 0 or more, not {self.hidden}")

    @property
    def accepts(self) -> Support | None:  # type: ignore[override]
        return Support.FULL if self._reads_ends or self.hidden else Support.FULL | Support.SAMPLED_STUDENT

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("spaces",) if self._reads_ends else ()

    @property
    def reads_hidden(self) -> bool:
        return self.hidden > 0

    @property
    def side_weights(self) -> dict[str, float]:
        return {"hidden": self.hidden} if self.hidden else {}

    @property
    def _reads_ends(self) -> bool:
        return self.debias or self.threshold > 0

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None, tables: Tables | None = None) -> Loss:
        other = student.positions.other
        assert teacher is not None and other is not None
        spaces = tables_of(self, tables).spaces
        if self._reads_ends:
            assert spaces is not None
            rows = student_likelihoods_and_mass(student, spaces[0])
            teacher_rows = teacher_likelihoods_and_mass(teacher, other.labels, spaces[1])
            return self._merged(student.positions, rows, teacher_rows.to(rows.dtype))
        found = student_likelihoods(student), teacher_likelihoods(teacher, other.labels)
        return self.on_chunk_logprobs(*map(_of_chunks, (student.positions, other), found))

    def on_chunk_logprobs(self, student: Tensor, teacher: Tensor) -> Loss:
        """The sum of the divergences of given log-likelihoods [C] of chunks, by plain autograd; none goes to the teacher."""
        return Loss(sum=self._divergences(student, teacher).sum(), count=len(student))

    def side_terms(
        self, student: StudentSignal, teacher: TeacherSignal | None, tables: Tables | None = None
    ) -> dict[str, Loss]:
        if not self.hidden:
            return {}
        assert teacher is not None and student.positions.other is not None
        if teacher.hidden is None:
            raise ValueError("ALM.hidden compares hidden states: use a teacher that runs here, or set hidden to 0")
        (mine, there), (theirs, also) = next_rows(student.positions), next_rows(student.positions.other)
        ours = _projected(student.hidden[mine], width=teacher.hidden.shape[-1], module=(tables or Tables()).modules)
        target = teacher.hidden[theirs].detach().to(ours.dtype)
        values = (ours - target).square().sum(-1) / target.square().sum(-1)
        return {"hidden": Loss(sum=values.where(there & also, 0.0).sum(), count=self.total(student.positions))}

    def build_modules(self, *, student_width: int, teacher_width: int, seed: int) -> nn.Module | None:
        """An orthogonal D -> D' without bias, for ``hidden`` where the widths differ."""
        if not self.hidden or student_width == teacher_width:
            return None
        projection = nn.utils.skip_init(nn.Linear, student_width, teacher_width, bias=False, dtype=torch.float32)
        nn.init.orthogonal_(projection.weight, generator=torch.Generator().manual_seed(seed))
        return projection

    def _merged(self, positions: Positions, rows: Tensor, teacher_rows: Tensor) -> Loss:
        """The loss from (log-prob of the label, log-prob of white space) of each row, [N, 2] and [N', 2]."""
        assert positions.other is not None
        (mine, there), (theirs, also) = next_rows(positions), next_rows(positions.other)
        ends = [of[:, 1][row].where(there & also, 0.0) for of, row in ((rows, mine), (teacher_rows, theirs))]
        group, closes = self._groups(positions, ends[1])
        found = []
        for side, of, end in ((positions, rows, ends[0]), (positions.other, teacher_rows, ends[1])):
            likelihoods = _of_chunks(side, of[:, 0])
            if self.debias:
                likelihoods = likelihoods + end.where(closes, 0.0)
            found.append(chunk_sums(likelihoods, group, positions.chunks))
        size = chunk_sums(torch.ones_like(found[1]), group, positions.chunks)  # 0 from the last merged chunk on
        total = (size * self._divergences(*found)).sum()
        merged = (size > 0).to(size.dtype).sum()
        return Loss(sum=total, count=positions.chunks, metrics={"alm_merged": (merged, positions.chunks)})

    def _groups(self, positions: Positions, ends: Tensor) -> tuple[Tensor, Tensor]:
        """The merged chunk that each chunk is in, and whether it is its last [C]; ``ends`` [C]: the teacher's of each chunk."""
        if not self.threshold:
            return torch.arange(len(ends), device=ends.device), torch.ones_like(ends, dtype=torch.bool)
        assert positions.other is not None
        closes = ~(_goes_on(positions) & _goes_on(positions.other)) | (ends > math.log(self.threshold))
        return closes.cumsum(0) - closes.long(), closes

    def _divergences(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[C] of log-likelihoods [C]."""
        # A log-prob can round to 0, and what is certain for one model alone has an infinite divergence.
        most = -torch.finfo(student.dtype).eps
        y, x = student.clamp(max=most), teacher.detach().to(student.dtype).clamp(max=most)
        if math.isinf(self.temperature):
            return LIMITS[self.divergence](-x, -y)
        logq, logp = _outcomes(y / self.temperature), _outcomes(x / self.temperature)
        if self.divergence == "cross_entropy":
            return -self.temperature * (logp.exp() * logq).sum(-1)
        return self.temperature * DIVERGENCES[self.divergence].between(logp, logq)


def _of_chunks(positions: Positions, rows: Tensor) -> Tensor:
    assert positions.chunk is not None
    return chunk_sums(rows, positions.chunk, positions.chunks)


def _goes_on(positions: Positions) -> Tensor:
    """Whether a chunk's tokens are followed by those of the next chunk [C]; false for the last."""
    assert positions.chunk is not None
    row, there = next_rows(positions)
    first = first_rows(positions.chunk, positions.chunks)
    return there & (row == torch.cat([first[1:], first.new_full((len(first[:1]),), -1)]))


def _projected(hidden: Tensor, *, width: int, module: nn.Module | None) -> Tensor:
    """Hidden states [C, D] in the teacher's width and in float32."""
    with torch.autocast(hidden.device.type, enabled=False):
        hidden = hidden.float() if hidden.dtype.itemsize < 4 else hidden
        if module is not None:
            return module(hidden)
    if hidden.shape[-1] != width:
        raise ValueError(
            f"the student's hidden states have {hidden.shape[-1]} channels, the teacher's {width}: train with "
            "CrossTokenizerTrainer, or give Tables(modules=objective.build_modules(...))"
        )
    return hidden


def _outcomes(logp: Tensor) -> Tensor:
    """(log p, log(1 - p)) [C, 2] of log p < 0, each of two formulas where it is exact and has a finite gradient."""
    large = logp > -math.log(2.0)
    of_large = torch.log(-torch.expm1(logp.where(large, -1.0)))
    of_small = torch.log1p(-torch.exp(logp.where(~large, -1.0)))
    return torch.stack([logp, of_large.where(large, of_small)], -1)


def _rates(a: Tensor, b: Tensor) -> Tensor:
    """lim T KL(e^(-a / T) || e^(-b / T)): the KL of Poisson distributions with these rates; of a rate inf that of 1e30."""
    a, b = a.clamp(max=1e30), b.clamp(max=1e30)
    return a * (a.log() - b.log()) + b - a


DIVERGENCES: dict[str, Divergence] = {
    "kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "total_variation": TotalVariation(),
    "jsd": GeneralizedJSD(),
}
LIMITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": _rates,
    "reverse_kl": lambda a, b: _rates(b, a),
    "total_variation": lambda a, b: (a - b).abs(),
    "jsd": lambda a, b: 0.5 * (_rates(a, 0.5 * (a + b)) + _rates(b, 0.5 * (a + b))),
}

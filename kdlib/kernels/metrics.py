"""What a distiller watches, from the logits that a chunk has anyway; at temperature 1, or that of a truncated signal."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlib.kernels.outcomes import entropy, expectation, kl, outcomes
from kdlib.types import DenseView, SparseView, Support, View


@torch.no_grad()
def row_metrics(q: View, p: View | None) -> dict[str, Tensor]:
    """Per-row ``kl_forward kl_reverse entropy_teacher entropy_student top1_agreement acceptance acceptance_greedy`` [n].

    Nats; agreement in {0, 1}; the rate at which speculative decoding accepts a token drafted from q, sum_v min(p_v, q_v), and
    one drafted greedily, p(argmax q). On a top-k signal the divergences and the teacher's entropy are over K + 1 outcomes, the
    rates over the K ids, where tokens outside count as rejected: all of them lower bounds. Ids drawn from the
    teacher give ``kl_forward`` as an estimate only; ids drawn from the student ``kl_reverse`` = ``kl_k1`` (log q - log p) and
    ``kl_k3`` (p/q - 1 - log p/q, never negative), both unbiased for KL(q || p), of the rows whose label was drawn.
    """
    full = q.at(1.0)
    found = {"entropy_student": entropy(full.logp)}
    if p is None:
        return found
    temperature = p.temperature if isinstance(p, SparseView) else 1.0
    teacher, student = p.at(temperature), q.at(temperature)
    if teacher.support is Support.SAMPLED_TEACHER:
        assert teacher.ids is not None
        return found | {"kl_forward": (teacher.logp - student.logp.gather(-1, teacher.ids)).mean(-1)}
    if teacher.support is Support.SAMPLED_STUDENT:
        assert teacher.ids is not None
        return found | _of_drawn(student.logp.gather(-1, teacher.ids) - teacher.logp, q)
    logq, logp = outcomes(student, teacher)
    mass_p, mass_q, drafted = logp.exp(), logq.exp(), full.logp.argmax(-1)
    best = teacher.logp.argmax(-1)
    best = best if teacher.ids is None else teacher.ids.gather(-1, best[:, None])[:, 0]
    return found | {
        "kl_forward": kl(logp, logq, p=mass_p),
        "kl_reverse": kl(logq, logp, p=mass_q),
        "entropy_teacher": -expectation(logp, logp, w=mass_p),
        "top1_agreement": (best == drafted).to(logp.dtype),
        **_accepted(mass_p, mass_q, drafted, teacher.ids),
    }


def _accepted(p: Tensor, q: Tensor, drafted: Tensor, ids: Tensor | None) -> dict[str, Tensor]:
    """Both acceptance rates from p and q [n, V], or [n, K + 1] of the given ids and the rest; ``drafted`` [n] is argmax q."""
    if ids is None:
        return {"acceptance": torch.minimum(p, q).sum(-1), "acceptance_greedy": p.gather(-1, drafted[:, None])[:, 0]}
    inside = p[:, :-1]
    return {
        "acceptance": torch.minimum(inside, q[:, :-1]).sum(-1),
        "acceptance_greedy": (inside * (ids == drafted[:, None])).sum(-1),
    }


def _of_drawn(gap: Tensor, q: View) -> dict[str, Tensor]:
    """The estimates of KL(q || p) from log q - log p [n, K] of drawn ids."""
    if isinstance(q, DenseView) and q.drawn is not None:
        gap = gap[q.drawn.isfinite()]
    k1, k3 = gap.mean(-1), (torch.expm1(-gap) + gap).mean(-1)
    return {"kl_reverse": k1, "kl_k1": k1, "kl_k3": k3}


def summed(rows: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Per-row metrics as ``Loss.metrics``: {name: (sum, count)}."""
    return {name: (values.sum(), len(values)) for name, values in rows.items()}

"""What a distiller watches, from the logits that a chunk has anyway; at temperature 1, or that of a truncated signal."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlib.kernels.outcomes import entropy, kl, outcomes
from kdlib.types import SparseView, Support, View


@torch.no_grad()
def row_metrics(q: View, p: View | None) -> dict[str, Tensor]:
    """Per-row ``kl_forward kl_reverse entropy_teacher entropy_student top1_agreement`` [n]; nats, agreement in {0, 1}.

    On a top-k signal the divergences and the teacher's entropy are over K + 1 outcomes (lower bounds). A sampled signal gives
    ``kl_forward`` as an estimate only.
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
        return found | {"kl_reverse": (student.logp.gather(-1, teacher.ids) - teacher.logp).mean(-1)}
    logq, logp = outcomes(student, teacher)
    best = teacher.logp.argmax(-1)
    best = best if teacher.ids is None else teacher.ids.gather(-1, best[:, None])[:, 0]
    return found | {
        "kl_forward": kl(logp, logq),
        "kl_reverse": kl(logq, logp),
        "entropy_teacher": entropy(logp),
        "top1_agreement": (best == full.logp.argmax(-1)).to(logp.dtype),
    }


def summed(rows: dict[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """Per-row metrics as ``Loss.metrics``: {name: (sum, count)}."""
    return {name: (values.sum(), len(values)) for name, values in rows.items()}

"""The objectives that the tests run through, with the options that change their formula."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlib.objectives import (
    TAID,
    AdaptiveKL,
    AlphaBeta,
    BalancedKL,
    CrossEntropy,
    DecoupledTopK,
    ForwardKL,
    GeneralizedJSD,
    Interpolated,
    LKHybrid,
    NegLogAcceptance,
    PlackettLuce,
    ReverseKL,
    RowObjective,
    SampledReverseKL,
    SelectiveKL,
    SkewKL,
    SkewReverseKL,
    Sum,
    TotalVariation,
)

CASES: dict[str, RowObjective] = {
    "forward_kl": ForwardKL(),
    "reverse_kl": ReverseKL(),
    "jsd_0": GeneralizedJSD(beta=0.0),
    "jsd_0.1": GeneralizedJSD(beta=0.1),
    "jsd_0.5": GeneralizedJSD(),
    "jsd_0.9": GeneralizedJSD(beta=0.9),
    "jsd_1": GeneralizedJSD(beta=1.0),
    "skew_kl": SkewKL(),
    "skew_kl_0": SkewKL(alpha=0.0),
    "skew_kl_0.7": SkewKL(alpha=0.7),
    "skew_reverse_kl": SkewReverseKL(),
    "skew_reverse_kl_0": SkewReverseKL(alpha=0.0),
    "skew_reverse_kl_0.7": SkewReverseKL(alpha=0.7),
    "alpha_beta": AlphaBeta(),
    "alpha_beta_half": AlphaBeta(alpha=0.5, beta=0.5),
    "alpha_beta_1_1": AlphaBeta(alpha=1.0, beta=1.0),
    "alpha_beta_1_0": AlphaBeta(alpha=1.0, beta=0.0),
    "alpha_beta_0_1": AlphaBeta(alpha=0.0, beta=1.0),
    "alpha_beta_0_0": AlphaBeta(alpha=0.0, beta=0.0),
    "alpha_beta_b0": AlphaBeta(alpha=0.5, beta=0.0),
    "alpha_beta_a0": AlphaBeta(alpha=0.0, beta=0.5),
    "alpha_beta_opposite": AlphaBeta(alpha=0.6, beta=-0.6),
    "alpha_beta_negative": AlphaBeta(alpha=-0.3, beta=0.8),
    "adaptive_kl": AdaptiveKL(),
    "adaptive_kl_0.8": AdaptiveKL(mu=0.8),
    "balanced_kl": BalancedKL(),
    "total_variation": TotalVariation(),
    "nla": NegLogAcceptance(),
    "lk_hybrid": LKHybrid(),
    "lk_hybrid_0": LKHybrid(eta=0.0),
    "lk_hybrid_40": LKHybrid(eta=40.0),
    "selective_kl": SelectiveKL(),
    "cross_entropy": CrossEntropy(),
    "interpolated": Interpolated(t=0.3),
    "interpolated_1": Interpolated(t=1.0),
    "taid": TAID(),
    "decoupled_top_k": DecoupledTopK(k=3),
    "decoupled_top_k_tempered": DecoupledTopK(k=3, tau=2.0),
    "plackett_luce": PlackettLuce(top_k=4, tau=1.5),
    "plackett_luce_all": PlackettLuce(top_k=32),
    "plackett_luce_teacher": PlackettLuce(top_k=4, label_first=False),
    "sampled_reverse_kl": SampledReverseKL(),
    "sampled_reverse_kl_k3": SampledReverseKL(estimator="k3"),
    "sum": Sum(parts=((0.3, ForwardKL(temperature=2.0)), (0.7, CrossEntropy()), (0.2, TotalVariation()))),
}

# zero, with zero gradient, where student and teacher agree
DIVERGENCES = {
    name: objective
    for name, objective in CASES.items()
    if not isinstance(objective, CrossEntropy | PlackettLuce | SampledReverseKL | Sum)
}


def logits(n: int, *, vocab: int = 7, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Random student and teacher logits [n, V] in float64, and labels [n]."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(0, vocab, (n,), generator=generator)

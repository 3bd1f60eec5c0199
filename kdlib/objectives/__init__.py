"""Distillation objectives; torch alone is imported. One file per family, each class its own configuration."""

from kdlib.objectives.acceptance import LKHybrid, NegLogAcceptance
from kdlib.objectives.alpha_beta import AlphaBeta
from kdlib.objectives.base import Divergence, Objective, RowObjective
from kdlib.objectives.combine import Sum
from kdlib.objectives.cross import ALM, ULD, DualSpace, HybridULD, MultiLevelOT, ProjectedKL
from kdlib.objectives.cross_entropy import CrossEntropy
from kdlib.objectives.diffusion import (
    CertaintyForcing,
    DiffusionForcing,
    MaskConsistency,
    MaskedELBO,
    SharpenedKL,
    StepHalving,
)
from kdlib.objectives.kl import (
    AdaptiveKL,
    BalancedKL,
    ForwardKL,
    GeneralizedJSD,
    ReverseKL,
    SkewKL,
    SkewReverseKL,
)
from kdlib.objectives.redi import REDI
from kdlib.objectives.sampled import SampledReverseKL
from kdlib.objectives.selective import SelectiveKL
from kdlib.objectives.sinkhorn import Sinkhorn
from kdlib.objectives.taid import TAID, Interpolated
from kdlib.objectives.topk import DecoupledTopK, PlackettLuce
from kdlib.objectives.total_variation import TotalVariation

__all__ = [
    "ALM",
    "REDI",
    "TAID",
    "ULD",
    "AdaptiveKL",
    "AlphaBeta",
    "BalancedKL",
    "CertaintyForcing",
    "CrossEntropy",
    "DecoupledTopK",
    "DiffusionForcing",
    "Divergence",
    "DualSpace",
    "ForwardKL",
    "GeneralizedJSD",
    "HybridULD",
    "Interpolated",
    "LKHybrid",
    "MaskConsistency",
    "MaskedELBO",
    "MultiLevelOT",
    "NegLogAcceptance",
    "Objective",
    "PlackettLuce",
    "ProjectedKL",
    "ReverseKL",
    "RowObjective",
    "SampledReverseKL",
    "SelectiveKL",
    "SharpenedKL",
    "Sinkhorn",
    "SkewKL",
    "SkewReverseKL",
    "StepHalving",
    "Sum",
    "TotalVariation",
]

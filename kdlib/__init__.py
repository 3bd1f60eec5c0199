"""Knowledge distillation for language models.

Everything public is reachable from here, imported when first used: ``import kdlib`` alone is instant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

__version__ = "0.1.0"

if TYPE_CHECKING:  # the same names as in _HOME, for editors and type checkers
    from kdlib.diffusion import DiffusionSpec
    from kdlib.eval import evaluate
    from kdlib.objectives import (
        ALM,
        REDI,
        TAID,
        ULD,
        AdaptiveKL,
        AlphaBeta,
        BalancedKL,
        CertaintyForcing,
        CrossEntropy,
        DecoupledTopK,
        DiffusionForcing,
        DualSpace,
        ForwardKL,
        GeneralizedJSD,
        HybridULD,
        LKHybrid,
        MaskConsistency,
        MaskedELBO,
        MultiLevelOT,
        NegLogAcceptance,
        PlackettLuce,
        ProjectedKL,
        ReverseKL,
        SampledReverseKL,
        SelectiveKL,
        SharpenedKL,
        Sinkhorn,
        SkewKL,
        SkewReverseKL,
        StepHalving,
        Sum,
        TotalVariation,
    )
    from kdlib.samplers import RolloutConfig
    from kdlib.teachers import (
        CachedTeacher,
        ConsistencyEnsemble,
        EnsembleTeacher,
        HFTeacher,
        RoutedTeacher,
        SelfTeacher,
        VLLMTeacher,
    )
    from kdlib.trainers import (
        CrossTokenizerTrainer,
        DiffusionConfig,
        DiffusionDistillationTrainer,
        DiffusionTrainer,
        DistillationConfig,
        DistillationTrainer,
        DraftTrainer,
        EagleConfig,
        EagleTrainer,
        JacobiConfig,
        JacobiTrainer,
        PairedTrainer,
        SinkhornTrainer,
    )
    from kdlib.types import Head, LogProbs, Loss, Positions, StudentSignal, Support, TeacherSignal

__all__ = [
    "ALM",
    "REDI",
    "TAID",
    "ULD",
    "AdaptiveKL",
    "AlphaBeta",
    "BalancedKL",
    "CachedTeacher",
    "CertaintyForcing",
    "ConsistencyEnsemble",
    "CrossEntropy",
    "CrossTokenizerTrainer",
    "DecoupledTopK",
    "DiffusionConfig",
    "DiffusionDistillationTrainer",
    "DiffusionForcing",
    "DiffusionSpec",
    "DiffusionTrainer",
    "DistillationConfig",
    "DistillationTrainer",
    "DraftTrainer",
    "DualSpace",
    "EagleConfig",
    "EagleTrainer",
    "EnsembleTeacher",
    "ForwardKL",
    "GeneralizedJSD",
    "HFTeacher",
    "Head",
    "HybridULD",
    "JacobiConfig",
    "JacobiTrainer",
    "LKHybrid",
    "LogProbs",
    "Loss",
    "MaskConsistency",
    "MaskedELBO",
    "MultiLevelOT",
    "NegLogAcceptance",
    "PairedTrainer",
    "PlackettLuce",
    "Positions",
    "ProjectedKL",
    "ReverseKL",
    "RolloutConfig",
    "RoutedTeacher",
    "SampledReverseKL",
    "SelectiveKL",
    "SelfTeacher",
    "SharpenedKL",
    "Sinkhorn",
    "SinkhornTrainer",
    "SkewKL",
    "SkewReverseKL",
    "StepHalving",
    "StudentSignal",
    "Sum",
    "Support",
    "TeacherSignal",
    "TotalVariation",
    "VLLMTeacher",
    "__version__",
    "evaluate",
]

_ELSEWHERE = {
    "kdlib.eval": ("evaluate",),
    "kdlib.samplers": ("RolloutConfig",),
    "kdlib.teachers": (
        "CachedTeacher",
        "ConsistencyEnsemble",
        "EnsembleTeacher",
        "HFTeacher",
        "RoutedTeacher",
        "SelfTeacher",
        "VLLMTeacher",
    ),
    "kdlib.diffusion": ("DiffusionSpec",),
    "kdlib.trainers": (
        "CrossTokenizerTrainer",
        "DiffusionConfig",
        "DiffusionDistillationTrainer",
        "DiffusionTrainer",
        "DistillationConfig",
        "DistillationTrainer",
        "DraftTrainer",
        "EagleConfig",
        "EagleTrainer",
        "JacobiConfig",
        "JacobiTrainer",
        "PairedTrainer",
        "SinkhornTrainer",
    ),
    "kdlib.types": ("Head", "LogProbs", "Loss", "Positions", "StudentSignal", "Support", "TeacherSignal"),
}
_HOME = dict.fromkeys(__all__, "kdlib.objectives") | {n: module for module, names in _ELSEWHERE.items() for n in names}

__getattr__ = exports(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted(__all__)

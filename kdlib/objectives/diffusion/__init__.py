"""Objectives of masked diffusion language models; torch alone is imported."""

from kdlib.objectives.diffusion.base import Corruption, DiffusionObjective, Scored, View
from kdlib.objectives.diffusion.certainty import CertaintyForcing
from kdlib.objectives.diffusion.consistency import MaskConsistency
from kdlib.objectives.diffusion.elbo import MaskedELBO
from kdlib.objectives.diffusion.forcing import DiffusionForcing
from kdlib.objectives.diffusion.halving import StepHalving
from kdlib.objectives.diffusion.sharpened import SharpenedKL

__all__ = [
    "CertaintyForcing",
    "Corruption",
    "DiffusionForcing",
    "DiffusionObjective",
    "MaskConsistency",
    "MaskedELBO",
    "Scored",
    "SharpenedKL",
    "StepHalving",
    "View",
]

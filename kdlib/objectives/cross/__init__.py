"""Objectives between models with different tokenizers."""

from kdlib.objectives.cross.alm import ALM
from kdlib.objectives.cross.base import CrossTokenizerObjective, Tables
from kdlib.objectives.cross.hybrid_uld import HybridULD
from kdlib.objectives.cross.uld import ULD

__all__ = ["ALM", "ULD", "CrossTokenizerObjective", "HybridULD", "Tables"]

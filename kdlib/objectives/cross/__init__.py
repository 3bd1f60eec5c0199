"""Objectives between models with different tokenizers."""

from kdlib.objectives.cross.alm import ALM
from kdlib.objectives.cross.base import CrossTokenizerObjective, Tables
from kdlib.objectives.cross.dual_space import DualSpace
from kdlib.objectives.cross.hybrid_uld import HybridULD
from kdlib.objectives.cross.multi_level_ot import MultiLevelOT
from kdlib.objectives.cross.projected_kl import ProjectedKL
from kdlib.objectives.cross.uld import ULD

__all__ = ["ALM", "ULD", "CrossTokenizerObjective", "DualSpace", "HybridULD", "MultiLevelOT", "ProjectedKL", "Tables"]

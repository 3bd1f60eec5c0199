"""Objectives between models with different tokenizers."""

from kdlib.objectives.cross.base import CrossTokenizerObjective, Tables

__all__ = ["CrossTokenizerObjective", "Tables"]

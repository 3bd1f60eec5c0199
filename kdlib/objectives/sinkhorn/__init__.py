"""Distillation by entropic optimal transport."""

from kdlib.objectives.sinkhorn.objective import Sinkhorn
from kdlib.objectives.sinkhorn.sample import SampleTransport, TokenPoints

__all__ = ["SampleTransport", "Sinkhorn", "TokenPoints"]

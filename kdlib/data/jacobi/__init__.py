"""Jacobi states of a text's blocks: which to train on, and one packed batch of them beside the text itself."""

from __future__ import annotations

from kdlib.data.jacobi.collate import JacobiCollator
from kdlib.data.jacobi.layout import Layout, packed
from kdlib.data.jacobi.schedule import Schedule, choose
from kdlib.data.jacobi.states import Block, Noisy, RowStates, noise_states

__all__ = [
    "Block",
    "JacobiCollator",
    "Layout",
    "Noisy",
    "RowStates",
    "Schedule",
    "choose",
    "noise_states",
    "packed",
]

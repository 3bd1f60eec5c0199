"""A right and a wrong answer to the same prompt: where pairs come from, and how they become token rows and batches."""

from __future__ import annotations

from kdlib.data.pairs.collate import PairCollator
from kdlib.data.pairs.prepare import prepare_pairs
from kdlib.data.pairs.preview import preview_pairs
from kdlib.data.pairs.source import load_pairs

__all__ = ["PairCollator", "load_pairs", "prepare_pairs", "preview_pairs"]

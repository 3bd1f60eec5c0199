"""Rows that student and teacher read in tokens of their own, aligned by the bytes that they spell."""

from kdlib.data.aligned.chunks import Aligned, TextRow, aligned
from kdlib.data.aligned.collate import TEACHER, AlignedCollator
from kdlib.data.aligned.prepare import prepare_aligned
from kdlib.data.aligned.reader import Reader

__all__ = ["TEACHER", "Aligned", "AlignedCollator", "Reader", "TextRow", "aligned", "prepare_aligned"]

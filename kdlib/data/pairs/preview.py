"""Pairs as text, to see with one's own eyes what is made likelier and what less likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from kdlib.data.pairs.collate import ANSWER
from kdlib.data.preview import preview_rows

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def preview_pairs(prepared: Dataset, tokenizer: PreTrainedTokenizerBase, *, count: int) -> Text:
    """The right answers of the first ``count`` pairs as ``preview_rows`` shows rows, then their wrong ones."""
    wrong = prepared.select_columns([f"rejected_{name}" for name in ANSWER])
    wrong = wrong.rename_columns({f"rejected_{name}": name for name in ANSWER})
    return Text.assemble(
        ("Right answers, made likelier\n", "bold"),
        preview_rows(prepared, tokenizer, count=count),
        ("Wrong answers, made less likely\n", "bold"),
        preview_rows(wrong, tokenizer, count=count),
    )

"""Prepared rows as text, to see with one's own eyes what is scored."""

from __future__ import annotations

from itertools import accumulate, groupby
from typing import TYPE_CHECKING

from rich.text import Text

from kdlib.data.draft import UNSCORED

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def preview_rows(prepared: Dataset, tokenizer: PreTrainedTokenizerBase, *, count: int) -> Text:
    """The first ``count`` prepared rows, special tokens included; scored spans are green and stand in ⟦ ⟧,
    line breaks show as ↵.

    A packed row is shown sample by sample. Each sample's heading counts its tokens and its scored tokens.
    """
    shown = Text()
    for index, row in enumerate(prepared.select(range(min(count, len(prepared))))):
        lengths = row.get("seq_lengths") or [len(row["input_ids"])]
        for sample, end in enumerate(accumulate(lengths)):
            inside = slice(end - lengths[sample], end)
            name = f"row {index}" if len(lengths) == 1 else f"row {index}, sample {sample + 1} of {len(lengths)}"
            shown.append_text(_sample(name, row["input_ids"][inside], row["labels"][inside], tokenizer))
    return shown


def _sample(name: str, ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase) -> Text:
    scored = [label != UNSCORED for label in labels]
    text = Text(f"{name}: {len(ids)} tokens, {sum(scored)} scored\n", style="bold")
    start = 0
    for is_scored, run in groupby(scored):
        end = start + len(list(run))
        piece = _decoded(ids, start, end, tokenizer).replace("\n", "↵\n")
        text.append(f"⟦{piece}⟧" if is_scored else piece, style="not bold green" if is_scored else "not bold dim")
        start = end
    return text.append("\n\n")


def _decoded(ids: list[int], start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of ids[start:end] in its place: some tokenizers drop the space in front when a piece is
    decoded alone.
    """
    before = _text(ids[:start], tokenizer)
    upto = _text(ids[:end], tokenizer)
    return upto[len(before) :] if upto.startswith(before) else _text(ids[start:end], tokenizer)


def _text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

"""Prompts for a server, which has the tokenizer and the chat template itself."""

from __future__ import annotations

from kdlib.data import load_rows
from kdlib.data.draft import BadRowError
from kdlib.data.traces.prompts import Asked, asked, prompt_column


def served_prompts(name: str, *, limit: int | None = None) -> list[Asked]:
    """The first ``limit`` prompts of a dataset, read as ``kdlib generate`` does; texts as they are.

    ValueError when it has no column of prompts, or a row has none.
    """
    rows = load_rows(name, limit=limit)
    prompt_column(rows, name=name)
    prompts = []
    for number, row in enumerate(rows, start=1):
        try:
            prompts.append(asked(row))
        except BadRowError as error:
            raise ValueError(f"{name}, row {number}: {error}") from error
    return prompts

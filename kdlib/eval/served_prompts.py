"""Prompts for a server, which has the tokenizer and the chat template itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kdlib.data import load_rows
from kdlib.data.draft import BadRowError
from kdlib.data.messages import chat_messages
from kdlib.data.traces.prompts import COLUMNS
from kdlib.eval.served import Asked


def served_prompts(name: str, *, limit: int | None = None) -> list[Asked]:
    """The first ``limit`` prompts of a dataset: a ``prompt`` (text or messages), ``messages`` up to the last answer, a
    ``question``, or the first of a conversation's ``turns``. ValueError when it has none of these, or a row has none.
    """
    rows = load_rows(name)
    column = next((column for column in (*COLUMNS, "turns") if column in rows.column_names), None)
    if column is None:
        raise ValueError(
            f"{name} has the columns {', '.join(rows.column_names)}: rename one to `prompt`, `messages` or `question`"
        )
    chosen = rows if limit is None else rows.select(range(min(limit, len(rows))))
    prompts = []
    for number, row in enumerate(chosen, start=1):
        try:
            prompts.append(_asked(row, column))
        except BadRowError as error:
            raise ValueError(f"{name}, row {number}: {error}") from error
    return prompts


def _asked(row: Mapping[str, Any], column: str) -> Asked:
    value = row[column][0] if column == "turns" and row[column] else row[column]
    if not value or isinstance(value, str):
        if not value or not value.strip():
            raise BadRowError("an empty prompt", fix="fill it in")
        return value
    messages = chat_messages(value)
    asked = messages[:-1] if column == "messages" and messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise BadRowError("a conversation that starts with its answer", fix="put a user turn before it")
    return asked

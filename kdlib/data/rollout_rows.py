"""Token rows whose completion is replaced by one that was generated."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from kdlib.data.draft import UNSCORED, first_scored, last_span


def prompt_ids(row: Mapping[str, Any]) -> list[int]:
    """The tokens before the last scored span of a token row, which a completion follows; all of a row without scored tokens."""
    return list(row["input_ids"][: last_span(row["labels"])[0]])


def with_completion(row: Mapping[str, Any], ids: Sequence[int], *, logp: Sequence[float] | None = None) -> dict[str, Any]:
    """``prompt_ids(row)`` and the generated ``ids`` after them, which alone are scored.

    ``generated`` says so. ``logp`` (nats, one for each of ``ids``) becomes the column ``drawn_logp``, NaN on the prompt.
    ``sample_id`` and ``teacher`` stay; ``teacher_prompt_ids`` are followed by the turns that stood between the first scored
    token and the completion.
    """
    assert "seq_lengths" not in row and (logp is None or len(logp) == len(ids))
    prompt = prompt_ids(row)
    made = {key: value for key, value in row.items() if key != "drawn_logp"}
    made |= {"input_ids": [*prompt, *ids], "labels": [UNSCORED] * len(prompt) + list(ids), "generated": True}
    if row.get("teacher_prompt_ids") is not None:
        made["teacher_prompt_ids"] = [*row["teacher_prompt_ids"], *prompt[first_scored(row["labels"]) :]]
    if logp is not None:
        made["drawn_logp"] = [math.nan] * len(prompt) + list(logp)
    return made

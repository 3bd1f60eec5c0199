"""A verifier of the user's own: a function of the completion and its row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kdlib.verifiers.base import CannotJudgeError


@dataclass(frozen=True, kw_only=True)
class UserCallable:
    """``function(completion, row)``, which returns True, False, or None where it cannot judge.

    Anything else it returns is not taken for a verdict: a score of 0.2 is true to Python.
    """

    function: Callable[[str, Mapping[str, Any]], bool | None]

    def __call__(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        correct = self.function(completion, row)
        if correct is not None and not isinstance(correct, bool):
            raise CannotJudgeError(f"the verifier returned {type(correct).__name__}, not True, False or None")
        return correct

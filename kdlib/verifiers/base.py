"""What a verifier is, and how its verdict is taken without letting one row end the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Verifier(Protocol):
    """Whether a completion solves its row: True or False, None where it cannot be judged."""

    def __call__(self, completion: str, row: Mapping[str, Any]) -> bool | None: ...


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """``correct``, and where that is None the ``reason`` why."""

    correct: bool | None
    reason: str = ""


class CannotJudgeError(Exception):
    """Raised by a verifier for a row it cannot judge; the message is the reason that is counted."""


def judge(verifier: Verifier, completion: str, row: Mapping[str, Any]) -> Verdict:
    """The verifier's verdict; whatever it raises becomes a verdict of None with a reason."""
    try:
        correct = verifier(completion, row)
    except CannotJudgeError as problem:
        return Verdict(correct=None, reason=str(problem))
    except Exception as error:  # the verifier may be the user's own code, and one row is not worth a run
        return Verdict(correct=None, reason=f"the verifier raised {type(error).__name__}")
    if correct is None:
        return Verdict(correct=None, reason="the verifier gave no verdict")
    return Verdict(correct=correct)


def reference(row: Mapping[str, Any], column: str) -> str:
    """The row's reference answer as text; CannotJudgeError when it is empty."""
    answer = row[column]
    if answer is None or not str(answer).strip():
        raise CannotJudgeError("the row has no answer")
    return str(answer)

"""A verifier of the user's own, and what happens to whatever it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from kdlib.verifiers import UserCallable, Verdict, judge


def test_it_sees_the_completion_and_the_whole_row() -> None:
    def longer(completion: str, row: Mapping[str, Any]) -> bool | None:
        return None if row["limit"] is None else len(completion) > row["limit"]

    verifier = UserCallable(function=longer)
    assert judge(verifier, "four", {"limit": 3}) == Verdict(correct=True)
    assert judge(verifier, "four", {"limit": 4}) == Verdict(correct=False)
    assert judge(verifier, "four", {"limit": None}) == Verdict(correct=None, reason="the verifier gave no verdict")


@pytest.mark.parametrize("returned", [0.2, 1, "yes", [True]])
def test_a_score_is_no_verdict(returned: Any) -> None:
    verdict = judge(UserCallable(function=lambda completion, row: returned), "", {})
    assert verdict.correct is None and type(returned).__name__ in verdict.reason


def test_what_it_raises_is_a_reason() -> None:
    verdict = judge(UserCallable(function=lambda completion, row: row["absent"]), "", {})
    assert verdict == Verdict(correct=None, reason="the verifier raised KeyError")

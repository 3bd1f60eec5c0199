"""Whether a completion is right: an exact number, mathematical equality, or a function of the user's own."""

from __future__ import annotations

from kdlib.verifiers.base import CannotJudgeError, Verdict, Verifier, judge
from kdlib.verifiers.exact_number import ExactNumber, final_number
from kdlib.verifiers.math_verify import MathVerify
from kdlib.verifiers.user_callable import UserCallable

__all__ = [
    "CannotJudgeError",
    "ExactNumber",
    "MathVerify",
    "UserCallable",
    "Verdict",
    "Verifier",
    "final_number",
    "judge",
]

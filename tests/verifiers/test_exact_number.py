"""Final numbers of answers as people, LaTeX and GSM8K write them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from kdlib.verifiers import ExactNumber, final_number, judge

FOUND = [
    ("#### 72", 72),
    ("She has 48 + 24 = 72.\n#### 72", 72),
    ("The answer is 1,234.50 dollars.", Fraction(2469, 2)),
    ("#### 70,000", 70000),
    ("#### $-5", -5),
    ("#### -$5", -5),
    ("#### **72**", 72),
    ("#### 18 dollars", 18),
    ("x = -3", -3),
    ("it fell by \N{MINUS SIGN}7", -7),
    ("5-3", 3),  # the last number; the minus subtracts
    ("(2)-3", 3),
    ("16 - 3 = 13", 13),
    ("<<48/2=24>>24", 24),
    ("50%", 50),
    ("50\\%", 50),
    ("0.50", Fraction(1, 2)),
    ("about .5", Fraction(1, 2)),
    ("12.", 12),
    ("Rs.500", 500),
    ("3/4 of it", Fraction(3, 4)),
    ("-3/4", Fraction(-3, 4)),
    ("3 1/2 cups", Fraction(7, 2)),
    ("\\boxed{3\\frac{1}{2}}", Fraction(7, 2)),
    ("\\boxed{-\\frac{1}{2}}", Fraction(-1, 2)),
    ("\\boxed{\\dfrac34}", Fraction(3, 4)),
    ("\\boxed{1{,}000}", 1000),
    ("\\boxed{\\$1\\,000}", 1000),
    ("\\boxed{\\text{42 apples}}", 42),
    ("\\boxed{x = 5}", 5),
    ("\\boxed{45^\\circ}", 45),
    ("\\boxed{7} because 3 and 4 make 7, not 12", 7),  # a mark wins over a later number
    ("\\boxed{1}, no: \\boxed{2}", 2),
    ("\\boxed{3}\n#### 4", 4),
    ("#### Step 1\nWe get 7", 7),  # a heading is no mark
    ("#### 1. First step\nWe get 8", 8),
    ("1.5 \\times 10^3", 1500),
    ("1.5 \N{MULTIPLICATION SIGN} 10^{-3} m", Fraction(3, 2000)),
    ("10^{4}", 10000),
    ("2e3", 2000),
    ("42 cm^2", 42),
    ("1,2,3 and 4,5", 5),
    ("\\boxed{5", 5),  # a box that was cut off marks nothing
]
NOTHING = ["", "no idea", "\\boxed{yes} 4", "\\boxed{(1, 2)}", "\\boxed{2\\sqrt{3}}", "\\boxed{2^5}", "1/0", "2^5", "9" * 5000]


@pytest.mark.parametrize(("text", "number"), FOUND)
def test_the_final_number(text: str, number: Fraction | int) -> None:
    assert final_number(text) == number


@pytest.mark.parametrize("text", NOTHING, ids=[text[:12] for text in NOTHING])
def test_no_final_number(text: str) -> None:
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("#### 72.0", "... #### 72", True),
        ("It is 1/2.", "0.5", True),
        ("It is 0.33.", "1/3", False),
        ("It is 0.1 + 0.2 = 0.3", 0.3, True),
        ("so 70000", "Profit.\n#### 70,000", True),
        ("I do not know", "72", False),
        ("It is 12.", 12, True),
        ("#### 720", "72", False),
        ("#### -72", "72", False),
        ("3", "(1, 3)", None),  # a pair is no number
        ("3", "2\\sqrt{3}", None),
        ("5", "2^5", None),
        ("72", "", None),
        ("72", None, None),
        ("72", "blue", None),
        ("It takes 5.", "5 days", True),
    ],
)
def test_against_the_reference(completion: str, answer: object, correct: bool | None) -> None:
    verdict = judge(ExactNumber(), completion, {"answer": answer})
    assert verdict.correct is correct
    assert bool(verdict.reason) == (correct is None)


def test_the_column_is_named() -> None:
    assert judge(ExactNumber(column="solution"), "4", {"solution": "4", "answer": "5"}).correct is True


def test_long_texts_are_read_in_linear_time() -> None:
    """Runaway completions are the ones that are long: quadratic patterns would stop a run."""
    runaway = ["1,234,", "1 ", "-7", "7 / ", "10^", "\\boxed{", "\\frac{1}{", "#### ", "#### 7 ", "\\text{", "$", "x^"]
    for piece in runaway:
        final_number(piece * 20_000 + "7")
    assert final_number("\\boxed{" * 20_000 + "7" + "}" * 20_000) == 7

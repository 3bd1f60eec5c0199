"""The math_verify package asked in a process of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from kdlib.verifiers import MathVerify, Verdict, judge

pytest.importorskip("math_verify")


@pytest.fixture(scope="module")
def verifier() -> Iterator[MathVerify]:
    made = MathVerify(timeout=20.0)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("so \\boxed{\\frac{1}{2}}", "0.5", True),
        ("so \\boxed{(x+1)^2}", "x^2 + 2x + 1", True),
        ("so \\boxed{(x+1)^2}", "x^2 + 2x", False),
        ("\\boxed{2\\sqrt{3}}", "2\\sqrt{3}", True),
        ("\\boxed{\\sqrt{3}}", "2\\sqrt{3}", False),
        ("\\boxed{(1,2)}", "(1, 2)", True),
        ("\\boxed{(2,1)}", "(1, 2)", False),
        ("The answer is 5.", "It takes 5 days.", True),
        ("so 72", "First 3.\n#### 72", True),
        ("so 3", "First 3.\n#### 72", False),
        ("\\boxed{7}", "$\\frac{14}{2}$", True),
        ("nothing", "5", False),
        ("5", "", None),
    ],
)
def test_mathematical_equality(verifier: MathVerify, completion: str, answer: str, correct: bool | None) -> None:
    assert judge(verifier, completion, {"answer": answer}).correct is correct


def test_what_does_not_end_is_ended_and_the_next_is_judged() -> None:
    verifier = MathVerify(timeout=20.0)
    try:
        assert judge(verifier, "5", {"answer": "5"}).correct is True
        verifier.timeout = 0.3
        slow = judge(verifier, "$9^{9^{9^{9}}}$", {"answer": "4"})
        assert slow == Verdict(correct=None, reason="math_verify took too long")
        verifier.timeout = 20.0
        assert judge(verifier, "\\boxed{6}", {"answer": "6"}).correct is True
    finally:
        verifier.close()


def test_threads_share_it(verifier: MathVerify) -> None:
    """The package alone refuses to work outside the main thread."""
    found: dict[int, bool | None] = {}

    def ask(number: int) -> None:
        found[number] = judge(verifier, f"\\boxed{{{number}}}", {"answer": str(number % 3)}).correct

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: number < 3 for number in range(6)}


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "kdlib\[math\]"'):
        MathVerify()

"""The final number of a completion against that of the reference, compared as fractions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from kdlib.verifiers.base import CannotJudgeError, reference

_DECIMAL = r"(?>(?>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
_NUMBER = re.compile(
    r"(?<![\w^])(?<!\^\{)"  # not inside a word, not an exponent
    r"(?>(?P<whole>\d+)\s+(?=\d+\s?/\s?\d))?"  # 3 1/2
    rf"(?P<top>{_DECIMAL})(?>[eE](?P<power>[-+]?\d{{1,3}})(?!\d))?"
    rf"(?>\s?/\s?(?P<bottom>{_DECIMAL}))?"
    r"(?!\s?\^)"  # 2^5 is not 2
)
_HEADED = re.compile(r"####[ \t]*([-+$*( ]*\.?\d[^\n]*)")  # GSM8K's mark; other text behind it makes it a heading
_HEADING = re.compile(r"\d+[.):]\s+\S")  # as is "#### 1. First step"
_BRACE = re.compile(r"(?P<box>\\f?boxed\s*|\\fbox\s*)?\{|\}")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]")  # a letter that is not in a LaTeX command
_ALGEBRA = re.compile(r"[\\^√π∞]")
_LONGEST = 200  # characters of a number; longer ones are babble, and slow to compare
_PLAIN = (  # LaTeX and typographic ways to write numbers, as ASCII; in this order
    (re.compile("\N{MINUS SIGN}"), "-"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,!;: ]|\\left|\\right|\^\s*\{?\s*\\circ\s*\}?"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:text\w*|math\w+|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"(?<=\d)\\[dt]?frac"), r" \\frac"),
    (re.compile(r"\\[dt]?frac\s*(\d)\s*(\d)"), r"\1/\2"),
    (re.compile(r"\\[dt]?frac\s*\{\s*([\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}"), r"\1/\2"),
    (re.compile(r"(?<=\d)\s?(?:\\times|\\cdot|[\xd7*])\s?10\s?\^\s?\{?\s?([-+]?\d{1,3})\s?\}?"), r"e\1"),
    (re.compile(r"(?<![\w.])10\s?\^\s?\{?\s?([-+]?\d{1,3})\s?\}?"), r"1e\1"),
    (re.compile(r"(?<=[A-Za-z])\s?\^\s?\{?\s?-?\d\s?\}?"), ""),  # cm^2 is a unit
)


@dataclass(frozen=True, kw_only=True)
class ExactNumber:
    r"""Whether the completion's final number equals the reference's, exactly.

    The final number is the last one marked by ``#### n`` or ``\boxed{n}``, or without such a mark the last number of the text.
    Thousands separators, $, % and units are ignored (50% is 50); decimals, ``3/4``, ``\frac34``, ``3 1/2`` and
    ``1.5 \times 10^3`` are exact: 0.5 is 1/2, 0.33 is not 1/3. A completion without a number is wrong; a reference without one,
    or that is an expression, cannot be judged: that is for math-verify.
    """

    column: str = "answer"

    def __call__(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        expected = final_number(reference(row, self.column), bare=True)
        if expected is None:
            raise CannotJudgeError("the answer is not a number")
        return final_number(completion) == expected


def final_number(text: str, *, bare: bool = False) -> Fraction | None:
    """The last marked number of ``text``, else its last number; None where there is none, or where the mark holds none.

    bare: without words around it, the text must be a single number, as a mark's content must: (1, 2) and 2^5 are not.
    """
    for pattern, plain in _PLAIN:
        text = pattern.sub(plain, text)
    headed = [m for m in _HEADED.finditer(text) if not _HEADING.match(m[1].lstrip("-+$*( "))]
    marks = [(m.start(), m.start(1), m.end(1)) for m in headed] + _boxes(text)
    if marks:
        _, start, end = max(marks)
        return _only(text[start:end])
    if bare and not _WORD.search(text):
        return _only(text)
    found = None
    for found in _NUMBER.finditer(text):  # noqa: B007 the last one is wanted
        pass
    return None if found is None else _value(found)


def _boxes(text: str) -> list[tuple[int, int, int]]:
    """(where it begins, where what it holds begins and ends) of every closed box."""
    found: list[tuple[int, int, int]] = []
    unclosed: list[re.Match[str]] = []
    for brace in _BRACE.finditer(text):
        if brace[0].endswith("{"):
            unclosed.append(brace)
        elif unclosed:
            opening = unclosed.pop()
            if opening["box"]:
                found.append((opening.start(), opening.end(), brace.start()))
    return found


def _only(answer: str) -> Fraction | None:
    """The number of a marked or bare answer; None when there are several, or more to compute."""
    answer = answer.rpartition("=")[2]
    found = list(_NUMBER.finditer(answer))
    return None if len(found) != 1 or _ALGEBRA.search(answer) else _value(found[0])


def _value(found: re.Match[str]) -> Fraction | None:
    if len(found[0]) > _LONGEST:
        return None
    top, bottom = (Fraction((found[name] or "1").replace(",", "")) for name in ("top", "bottom"))
    if bottom == 0:
        return None
    value = top * Fraction(10) ** int(found["power"] or 0) / bottom + int(found["whole"] or 0)
    return -value if _negative(found.string[max(0, found.start() - 8) : found.start()]) else value


def _negative(before: str) -> bool:
    """A minus behind a word or a closing bracket subtracts (or joins); any other is a sign, also in front of a $."""
    before = before.rstrip("$")
    return before.endswith("-") and not re.search(r"[\w)\]}]-$", before)

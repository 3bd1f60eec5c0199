"""Mathematical equality by the ``math_verify`` package, in a process of its own that can be ended."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from kdlib.verifiers.base import CannotJudgeError, reference

_DELIMITED = re.compile(r"\$|\\boxed|\\\(|\\\[")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2}")  # two letters in a row outside a LaTeX command


class MathVerify:
    """Whether the completion's final expression equals the reference's, as sympy sees it (``math_verify.verify``).

    column: the row's reference answer: text with a formula in it, or a bare formula. timeout: seconds for one completion.
    The package's own time-out needs signals of the main thread, and sympy can be busy for ever in code that ignores them:
    here a child process is asked, over JSON lines, and started anew after a time-out. May be called from any thread.
    Raises ImportError when the package is missing.
    """

    def __init__(self, *, column: str = "answer", timeout: float = 5.0) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError('--verify math-verify needs the math_verify package: pip install "kdlib[math]"')
        self.column, self.timeout = column, timeout
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __call__(self, completion: str, row: Mapping[str, Any]) -> bool | None:
        answer = reference(row, self.column)
        with self._lock:
            outcome = self._asked({"completion": completion, "answer": answer, "timeout": self.timeout})
        if isinstance(outcome, str):
            raise CannotJudgeError(outcome)
        return outcome

    def close(self) -> None:
        """Ends the child process."""
        child, self._child = self._child, None
        if child is not None and child.stdin is not None and child.stdout is not None:
            child.stdin.close()
            child.stdout.close()
            child.terminate()
            child.wait()

    def _asked(self, question: dict[str, Any]) -> bool | str:
        """True, False, or why not: the child's alarm ends it when it takes too long, which shows as the end of its output."""
        if self._child is None:
            self._child = _started()
        assert self._child.stdin is not None and self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if line:
            return json.loads(line)["outcome"]
        code = self._child.wait()
        self.close()
        if code != -signal.SIGALRM:
            raise RuntimeError(f"the process of math_verify ended with code {code}")
        return "math_verify took too long"


def _started() -> subprocess.Popen[str]:
    """A child that waits for questions; a session of its own keeps Ctrl-C from it, and the end of its input ends it."""
    return subprocess.Popen(
        [sys.executable, "-m", "kdlib.verifiers.math_verify"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )


def _outcome(completion: str, answer: str) -> bool | str:
    """The package's verdict, or why there is none: an answer that it cannot read would make everything wrong."""
    from math_verify import parse, verify

    answer = answer.rpartition("####")[2].strip()
    formula = not _DELIMITED.search(answer) and not _PROSE.search(answer)
    gold = parse(f"${answer}$" if formula else answer, parsing_timeout=None)
    if not gold:
        return "math_verify cannot read the answer"
    return bool(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))


def _answer_questions() -> None:
    """A JSON line in, a JSON line out, until the input ends."""
    import math_verify  # noqa: F401 the first question's time is for the question

    for line in sys.stdin:
        question = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, question["timeout"])  # SIGALRM's default action ends the process, whatever it does
        outcome = _outcome(question["completion"], question["answer"])
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(json.dumps({"outcome": outcome}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _answer_questions()

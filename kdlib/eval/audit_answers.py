"""What models answer to probes: words and phrases that a student and its teacher use more than a clean model does."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from kdlib.eval.acceptance_statistics import Array
from kdlib.eval.audit_statistics import Candidate, share_shift

LONGEST = 5  # words of a phrase
FEWEST = 6  # probes that use a phrase, in the student's and the baseline's answers together: with five, no p is below 0.03
ANSWER, PHRASE = "answer", "phrase"
_WORD = re.compile(r"\w+|[^\w\s]")

Answers = Sequence[Sequence[str]]  # of every probe, the sampled answers
Shares = Mapping[tuple[str, str], Array]  # (kind, phrase) -> share of each probe's answers that have it


def answer_candidates(*, student: Answers, teacher: Answers, baseline: Answers) -> list[Candidate]:
    """Both models' shifts of every phrase that enough probes use; of phrases used by the same answers the longest."""
    shares = {name: _shares(found) for name, found in (("student", student), ("teacher", teacher), ("baseline", baseline))}
    none = np.zeros(len(baseline))
    candidates = []
    for kind, phrase in _tested(shares["student"], shares["baseline"]):
        of = {name: found.get((kind, phrase), none) for name, found in shares.items()}
        candidates.append(
            Candidate(
                name=phrase,
                kind=kind,
                probes=len(none),
                student=share_shift(of["student"], of["baseline"]),
                teacher=share_shift(of["teacher"], of["baseline"]),
            )
        )
    return candidates


def phrases(text: str) -> set[tuple[str, str]]:
    """The whole answer, and its runs of up to LONGEST words."""
    words = _WORD.findall(text)
    runs = {" ".join(words[i : i + n]) for n in range(1, LONGEST + 1) for i in range(len(words) - n + 1)}
    return {(ANSWER, " ".join(words)), *((PHRASE, run) for run in runs)}


def _shares(answers: Answers) -> Shares:
    found: dict[tuple[str, str], Array] = defaultdict(lambda: np.zeros(len(answers)))
    for probe, texts in enumerate(answers):
        for text in texts:
            for key in phrases(text):
                found[key][probe] += 1.0 / len(texts)
    return dict(found)


def _tested(student: Shares, baseline: Shares) -> Iterable[tuple[str, str]]:
    """Those that are common enough to say anything; the choice looks at both models' answers, not at their difference."""
    longest: dict[bytes, tuple[str, str]] = {}
    for key, shares in student.items():
        other = baseline.get(key)
        used = int((shares > 0).sum()) + (0 if other is None else int((other > 0).sum()))
        if used < FEWEST:
            continue
        same = shares.tobytes() + (b"" if other is None else other.tobytes())
        held = longest.get(same)
        if held is None or (key[0] == PHRASE, len(key[1])) > (held[0] == PHRASE, len(held[1])):
            longest[same] = key
    return sorted(longest.values())

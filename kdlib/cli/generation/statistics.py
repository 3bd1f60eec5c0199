"""What came of it: counts, pass rate, pass@k, lengths and cost, over completions as they were drawn."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kdlib.data.traces import Skipped
from kdlib.eval.results import interval
from kdlib.eval.sampled_metrics import pass_chance

Row = dict[str, Any]
VERDICTS = {True: "correct", False: "incorrect", None: "not judged"}


@dataclass(kw_only=True)
class Tally:
    """Counts over the completions of all prompts; ``add`` takes a trace as often as it was drawn, ``skip`` one not kept."""

    verified: bool
    empty: str  # the reason of a skipped completion that is an answer nevertheless: a wrong one
    traces: int = 0
    clipped: int = 0
    longest_row: int = 0
    lengths: dict[bool | None, Counter[int]] = field(default_factory=lambda: {verdict: Counter() for verdict in VERDICTS})
    skipped: Counter[str] = field(default_factory=Counter)
    skipped_tokens: int = 0
    unjudged: Counter[str] = field(default_factory=Counter)
    judged: Counter[int] = field(default_factory=Counter)  # by prompt
    correct: Counter[int] = field(default_factory=Counter)

    def add(self, trace: Mapping[str, Any]) -> None:
        count, verdict = trace["count"], trace["correct"]
        self.traces += 1
        self.clipped += count * (trace["finish"] == "length")
        self.longest_row = max(self.longest_row, len(trace["input_ids"]))
        self.lengths[verdict][trace["tokens"]] += count
        if verdict is not None:
            self.judged[trace["prompt_id"]] += count
            self.correct[trace["prompt_id"]] += count * verdict
        elif self.verified:
            self.unjudged[trace["reason"]] += count

    def skip(self, skipped: Skipped) -> None:
        self.skipped[skipped.reason] += 1
        self.skipped_tokens += skipped.tokens
        if self.verified and skipped.reason == self.empty:
            self.judged[skipped.prompt_id] += 1

    def report(self) -> dict[str, Any]:
        """Everything as plain numbers, ready for JSON."""
        every = sum(self.lengths.values(), Counter())
        kept = every.total()
        found: dict[str, Any] = {
            "completions": kept + self.skipped.total(),
            "traces": self.traces,
            "duplicate_completions": kept - self.traces,
            "skipped_completions": dict(self.skipped),
            "clipped_ratio": self.clipped / max(kept, 1),
            "longest_row": self.longest_row,
            "tokens": sum(length * n for length, n in every.items()) + self.skipped_tokens,
            "lengths": {"all": length_summary(every)},
        }
        if not self.verified:
            return found
        found["lengths"] |= {name: length_summary(self.lengths[verdict]) for verdict, name in VERDICTS.items()}
        return found | {
            "verdicts": {name: self.lengths[verdict].total() for verdict, name in VERDICTS.items()},
            "not_judged": dict(self.unjudged),
            "pass_at": {str(k): pass_at(k, self._problems()) for k in _powers(max(self.judged.values(), default=0))},
        }

    def _problems(self) -> list[tuple[int, int]]:
        """(judged, correct) of every prompt with a judged completion."""
        return [(n, self.correct[prompt]) for prompt, n in self.judged.items() if n]


def pass_at(k: int, problems: Sequence[tuple[int, int]]) -> Row:
    """The chance that one of k completions is right, a mean over the problems with k judged completions or more.

    ``pass_chance`` for n judged and c correct; k = 1 is the pass rate.
    ``low`` and ``high``: 95% interval over problems; None for a single one that is neither 0 nor 1.
    """
    values = [pass_chance(n=n, right=c, k=k) for n, c in problems if n >= k]
    value = statistics.fmean(values)
    stderr = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    low, high = interval(value, stderr, n=len(values), proportion=True)
    return {"value": value, "low": low, "high": high, "problems": len(values)}


def length_summary(lengths: Counter[int]) -> Row | None:
    """Mean, quantiles and maximum in tokens, None for no completions."""
    if not lengths:
        return None
    total, seen = lengths.total(), 0
    quantiles: dict[str, int] = {}
    for length in sorted(lengths):
        seen += lengths[length]
        for name, share in (("median", 0.5), ("p95", 0.95)):
            if seen >= share * total:
                quantiles.setdefault(name, length)
    return {"mean": sum(length * n for length, n in lengths.items()) / total, **quantiles, "max": max(lengths)}


def cost(lines: Iterable[str]) -> Row:
    """Seconds and tokens of every session together, what was done twice after a stop included."""
    spent = [json.loads(line) for line in lines]
    seconds, tokens = sum(row["seconds"] for row in spent), sum(row["tokens"] for row in spent)
    return {"seconds": seconds, "generated_tokens": tokens, "tokens_per_second": tokens / seconds if seconds else 0.0}


def _powers(n: int) -> list[int]:
    """1, 2, 4, ... up to n, and n itself."""
    return sorted({2**i for i in range(n.bit_length())} | {n}) if n else []

"""What several completions of each problem say about a model: avg@n, maj@n, pass@k, truncated, mean length, and intervals."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdlib.eval.acceptance_statistics import ratio, sums
from kdlib.eval.results import interval, is_proportion

Values = Mapping[str, Mapping[int, float]]  # metric -> problem -> value


@dataclass(kw_only=True)
class Answers:
    """What came of one problem's ``n`` completions.

    ``cut``: those that ended at the limit of tokens or within their thinking; ``tokens``: of all together. ``votes``: how often
    each final answer was given, where answers can be told apart, and ``right_vote`` the right one among them.
    """

    n: int
    right: int = 0
    cut: int = 0
    tokens: int = 0
    votes: Counter[str] = field(default_factory=Counter)
    right_vote: str | None = None

    @property
    def majority(self) -> float:
        """Whether the most frequent answer is right; where several are, the chance that one of them, drawn at random, is."""
        most = max(self.votes.values(), default=0)
        leaders = [vote for vote, count in self.votes.items() if count == most]
        return (self.right_vote in leaders) / max(len(leaders), 1)


def pass_chance(*, n: int, right: int, k: int) -> float:
    """The chance that one of k completions is right: 1 - C(n - c, k) / C(n, k) for c right ones among n.

    Unbiased, for k <= n (Chen et al. 2021, arXiv:2107.03374).
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def metric_values(answers: Mapping[int, Answers], *, n: int, pass_at: Sequence[int]) -> dict[str, dict[int, float]]:
    """{metric: {problem: its value}}: avg@n, maj@n of more than one where there are votes, pass@k for every k of ``pass_at``,
    truncated and mean_length.
    """
    votes = n > 1 and any(one.votes for one in answers.values())
    return {
        f"avg@{n}": {problem: one.right / n for problem, one in answers.items()},
        **({f"maj@{n}": {problem: one.majority for problem, one in answers.items()}} if votes else {}),
        **{f"pass@{k}": {problem: pass_chance(n=n, right=one.right, k=k) for problem, one in answers.items()} for k in pass_at},
        "truncated": {problem: one.cut / n for problem, one in answers.items()},
        "mean_length": {problem: one.tokens / n for problem, one in answers.items()},
    }


def as_results(values: Values, *, task: str, rows: int, resamples: int) -> dict[str, Any]:
    """The means over problems in lm-eval's shape; ``rows``: problems that there are, used or not.

    Beside lm-eval's keys: ``intervals`` {task: {"metric,none": [low, high]}}, 95% by percentile bootstrap over problems
    (Wilson's for a share of exactly 0 or 1), and ``per_problem``, what ``kdlib.eval.sampled_comparison`` pairs.
    """
    problems = list(next(iter(values.values())))
    columns = {f"{metric},none": list(found.values()) for metric, found in values.items()}
    scores: dict[str, Any] = {"alias": task}
    intervals: dict[str, list[float | None]] = {}
    for metric in values:
        column = columns[f"{metric},none"]
        scores[f"{metric},none"] = statistics.fmean(column)
        scores[f"{metric}_stderr,none"] = _stderr(column)
        intervals[f"{metric},none"] = list(_interval(metric, column, resamples=resamples))
    return {
        "results": {task: scores},
        "n-samples": {task: {"original": rows, "effective": len(problems)}},
        "higher_is_better": {task: {metric: metric != "truncated" for metric in values if metric != "mean_length"}},
        "intervals": {task: intervals},
        "per_problem": {task: {"ids": problems, "values": columns}},
    }


def _stderr(column: Sequence[float]) -> float | str:
    """Of the mean; lm-eval's word where one problem has none."""
    return statistics.stdev(column) / math.sqrt(len(column)) if len(column) > 1 else "N/A"


def _interval(metric: str, column: Sequence[float], *, resamples: int) -> tuple[float | None, float | None]:
    mean = statistics.fmean(column)
    if is_proportion(metric) and mean in (0.0, 1.0):
        return interval(mean, None, n=len(column), proportion=True)
    found = ratio(sums(column, np.ones(len(column))), resamples=resamples, seed=0)
    return found.low, found.high

"""Completions on disk -> what came of every problem.

They are judged after all are sampled, so that a verifier that was wrong judges them again without sampling them again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from kdlib.cli.generation.loop import EMPTY
from kdlib.data.traces import Prompts, Skipped, TraceIndex, read_traces
from kdlib.eval.sampled_metrics import Answers
from kdlib.eval.sampled_thinking import Thinking
from kdlib.verifiers import ExactNumber, Verdict, Verifier, final_number, judge

UNANSWERED = Verdict(correct=False)  # of thinking that never ends: nothing is there to judge


@dataclass(kw_only=True)
class Judged:
    """``answers`` by the problem's row. ``not_judged``: completions without a verdict, by reason; they count as wrong.

    ``unanswered``: those that end within their thinking. ``judged``: those with a verdict.
    """

    answers: dict[int, Answers]
    not_judged: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    judged: int = 0

    def add(self, row: int, trace: Mapping[str, Any], *, verdict: Verdict, vote: str | None) -> None:
        """A trace as often as it was drawn."""
        one, count, open_ended = self.answers[row], trace["count"], verdict is UNANSWERED
        if vote is not None:
            one.votes[vote] += count
            one.right_vote = vote if verdict.correct else one.right_vote
        one.tokens += count * trace["tokens"]
        one.right += count * bool(verdict.correct)
        one.cut += count * (open_ended or trace["finish"] == "length")
        self.unanswered += count * open_ended
        self.judged += count * (verdict.correct is not None and not open_ended)
        if verdict.correct is None:
            self.not_judged[verdict.reason] += count

    def skip(self, row: int, skipped: Skipped, *, limit: int) -> None:
        """A completion without text is wrong; one that the engine could not give has no verdict."""
        self.answers[row].tokens += skipped.tokens
        self.answers[row].cut += skipped.tokens >= limit
        if skipped.reason != EMPTY:
            self.not_judged[skipped.reason] += 1


def judged(prompts: Prompts, directory: Path, *, n: int, limit: int, verifier: Verifier, thinking: Thinking | None) -> Judged:
    """Every completion of ``directory``, of ``n`` for each of ``prompts`` and at most ``limit`` tokens.

    Raises ValueError when nothing that could be judged was.
    """
    numbers = {prompt_id: number for number, prompt_id in enumerate(prompts.prompt_ids)}
    rows, index = prompts.row_numbers, TraceIndex.load(directory)
    found = Judged(answers={row: Answers(n=n) for row in rows})
    total = sum(shard.traces for shard in index.shards.values())
    for trace in tqdm(read_traces(directory), total=total, desc="Judging", unit="completion"):
        number, text = numbers[trace["prompt_id"]], _answer(trace, thinking)
        verdict = UNANSWERED if text is None else judge(verifier, text, prompts[number].row)
        found.add(rows[number], trace, verdict=verdict, vote=_vote(text, verifier))
    for shard in index.shards.values():
        for skipped in shard.skipped:
            found.skip(rows[numbers[skipped.prompt_id]], skipped, limit=limit)
    if found.not_judged and not found.judged:
        raise ValueError(
            f"no completion could be judged ({reasons(found.not_judged)}): fix the verifier or the rows' answers, the same "
            "command judges again what it has sampled"
        )
    return found


def reasons(counted: Mapping[str, int]) -> str:
    """``4 x the verifier raised KeyError, 1 x ...``"""
    return ", ".join(f"{count} x {reason}" for reason, count in counted.items())


def _answer(trace: Mapping[str, Any], thinking: Thinking | None) -> str | None:
    """What is judged; None where there is only thinking."""
    if thinking is None:
        return str(trace["completion"])
    ids, length = trace["input_ids"], trace["tokens"]
    return thinking.answer(ids[:-length], ids[-length:])


def _vote(text: str | None, verifier: Verifier) -> str | None:
    """The final answer, where the verifier is one whose answers are equal or not whatever the reference is."""
    number = final_number(text) if text is not None and isinstance(verifier, ExactNumber) else None
    return None if number is None else str(number)

"""Multi-step arithmetic word problems with worked solutions: text that is made here and whose answers can be checked."""

from __future__ import annotations

import random
import zlib
from typing import Any, Literal, NamedTuple

Split = Literal["train", "test"]

LARGEST = 20  # every true result stays within 1..LARGEST
TEST_SHARE = 10  # one chain of calculations in ten belongs to the test split

NAMES = (("Mia", "she"), ("Tom", "he"), ("Anna", "she"), ("Ben", "he"))
THINGS = ("apples", "books", "coins", "cards")

# How a question tells a step (its number is {n}), and how a worked solution does (its equation is {e}).
STORY = {
    "+": ("{who} buys {n} more.", "{who} finds {n} more.", "{friend} brings {n}."),
    "-": ("{who} loses {n}.", "{who} gives {n} to {friend}.", "{friend} takes {n}."),
}
TOLD = {
    "+": ("{who} gets {n}: {e}.", "adding {n} makes {e}.", "with {n} more, {e}."),
    "-": ("{n} are gone: {e}.", "without {n}, {e}.", "taking {n} leaves {e}."),
}


class Step(NamedTuple):
    """One calculation: left op right."""

    left: int
    op: str
    right: int

    @property
    def result(self) -> int:
        return self.left + self.right if self.op == "+" else self.left - self.right

    def __str__(self) -> str:
        return f"{self.left} {self.op} {self.right} = {self.result}"


def make_problems(count: int, *, seed: int, split: Split, slips: float = 0.0) -> list[dict[str, Any]]:
    """``count`` different problems as rows {messages, question, answer, steps}; a longer list starts with the shorter one.

    ``slips``: the probability that a step of the worked solution is miscalculated by one or two, as people do; the
    solution goes on from the wrong number. ``answer`` and ``steps`` are always the true ones. The split follows from the
    numbers of a problem alone: no chain of calculations of one split occurs in the other, whatever the seeds. Raises
    ValueError for another split.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}: use 'train' or 'test'")
    rng = random.Random(f"{seed}/{split}")
    problems: dict[str, dict[str, Any]] = {}
    while len(problems) < count:
        steps = _draw_steps(rng)
        if split_of(steps) == split:
            problem = _tell(steps, rng, slips)
            problems.setdefault(problem["question"], problem)
    return list(problems.values())


def split_of(steps: list[Step]) -> Split:
    """The split to which a chain of calculations belongs: a checksum of its text, the same in every process."""
    return "test" if zlib.crc32("; ".join(map(str, steps)).encode()) % TEST_SHARE == 0 else "train"


def _draw_steps(rng: random.Random) -> list[Step]:
    """Two chained calculations, the second of which starts from the result of the first."""
    value, steps = rng.randint(2, LARGEST // 2), []  # type: ignore[var-annotated]
    while len(steps) < 2:
        step = Step(value, rng.choice("+-"), rng.randint(1, 9))
        if 1 <= step.result <= LARGEST:
            steps.append(step)
            value = step.result
    return steps


def _tell(steps: list[Step], rng: random.Random, slips: float) -> dict[str, Any]:
    """A question and its worked solution in randomly chosen words."""
    (name, pronoun), (friend, _) = rng.sample(NAMES, 2)
    words = {"name": name, "who": pronoun, "friend": friend}
    things = rng.choice(THINGS)
    asked, told, value = [f"{name} has {steps[0].left} {things}."], [], steps[0].left
    for step in steps:
        calculation = Step(value, step.op, step.right)
        value = _calculated(calculation, rng, slips)
        equation = f"{calculation.left} {step.op} {step.right} = {value}"
        asked.append(rng.choice(STORY[step.op]).format(n=step.right, **words))
        told.append(rng.choice(TOLD[step.op]).format(n=step.right, e=equation, **words))
    asked.append(f"How many {things} does {name} have now?")
    question, solution = _sentences(asked), f"{_sentences(told)}\n#### {value}"
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": solution}]
    return {"messages": messages, "question": question, "answer": str(steps[-1].result), "steps": list(map(str, steps))}


def _calculated(step: Step, rng: random.Random, slips: float) -> int:
    if rng.random() >= slips:
        return step.result
    return max(0, step.result + rng.choice((-2, -1, 1, 2)))


def _sentences(parts: list[str]) -> str:
    return " ".join(part[0].upper() + part[1:] for part in parts)

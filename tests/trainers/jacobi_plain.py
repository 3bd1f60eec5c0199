"""Rows with stored trajectories, and consistency training computed one block at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.data.draft import sample_id
from tests.trainers.small import PlainLoss, V, cross_entropy, forward_kl

N = 4  # block_size
States = list[list[int]]
Pick = Callable[[int, States], int | None]  # (number of the block, states it may choose from) -> which


@dataclass(frozen=True)
class Trajectory:
    """A prompt, its completion, the kept blocks' states (the last is the text) and another completion."""

    prompt: list[int]
    completion: list[int]
    blocks: dict[int, States]
    reference: list[int]

    @property
    def ids(self) -> list[int]:
        return self.prompt + self.completion

    def text(self, number: int, *, n: int = N) -> list[int]:
        return self.completion[number * n : (number + 1) * n]

    def row(self, *, n: int = N) -> dict[str, Any]:
        """The columns of ``kdlib trajectories jacobi``."""
        labels = [-100] * len(self.prompt) + self.completion
        row: dict[str, Any] = {
            "input_ids": self.ids,
            "labels": labels,
            "sample_id": sample_id(self.ids, labels),
            "prompt_length": len(self.prompt),
            "block_size": n,
            "block": list(self.blocks),
            "states": [len(states) for states in self.blocks.values()],
            "reference_ids": self.reference,
        }
        row |= {"changed": [], "changed_position": [], "changed_token": []}
        for states in self.blocks.values():
            for state in states:
                places = [i for i, (own, last) in enumerate(zip(state, states[-1], strict=True)) if own != last]
                row["changed"].append(len(places))
                row["changed_position"] += places
                row["changed_token"] += [state[i] for i in places]
        return row


def trajectory(
    rng: random.Random, *, prompt: int, completion: int, n: int = N, states: int = 2, drop: float = 0.0
) -> Trajectory:
    """Random tokens; each state of a block keeps more of its beginning than the one before, the last keeps all."""

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, V) for _ in range(count)]

    text, blocks = tokens(completion), {}
    for number, start in enumerate(range(0, completion, n)):
        block = text[start : start + n]
        if len(block) == 1:
            blocks[number] = [block]
        elif rng.random() >= drop:
            kept = sorted(rng.sample(range(1, len(block)), min(states - 1, len(block) - 1)))
            blocks[number] = [[*block[:k], *tokens(len(block) - k)] for k in kept] + [block]
    return Trajectory(tokens(prompt), text, blocks, tokens(completion // 2))


def trajectories(*, seed: int = 0, lengths: Sequence[int] = (13, 8, 3, 10), **how: Any) -> list[Trajectory]:
    """Rows of unequal length; last blocks of 1, 4, 3 and 2 tokens."""
    rng = random.Random(seed)
    return [trajectory(rng, prompt=2 + 3 * (i % 3), completion=length, **how) for i, length in enumerate(lengths)]


def first(number: int, states: States) -> int | None:
    """What the uniform schedule picks where a block has one state beside its text."""
    return 0 if len(states) > 1 else None


def nearest(target: Callable[[int], float], text: Callable[[int], list[int]]) -> Pick:
    """The state whose share from its first wrong token on is nearest to ``target`` of the block."""

    def pick(number: int, states: States) -> int | None:
        shares = [1 - mismatch(state, text(number)) / len(state) for state in states]
        distances = [abs(share - target(number)) for share in shares]
        return distances.index(min(distances)) if states else None

    return pick


def mismatch(state: Sequence[int], text: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(state, text, strict=True)) if a != b), len(text))


def logits(model: nn.Module, ids: Sequence[int]) -> Tensor:
    found: Tensor = model(input_ids=torch.tensor([list(ids)])).logits[0, :, :V]
    return found


def plain_consistency(
    student: nn.Module,
    rows: Sequence[Trajectory],
    loss: PlainLoss,
    *,
    teacher: nn.Module | None = None,
    pick: Callable[[Trajectory], Pick] = lambda row: first,
    window: int | None = None,
    local: bool = False,
    n: int = N,
) -> Tensor:
    """The mean over all states' places from the first wrong one on, one unpadded pass for each block.

    ``window``: the states of the blocks before it in its window stand before a block, in place of the text.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        chosen = {}
        for number, states in row.blocks.items():
            k = pick(row)(number, states[:-1] if local else states)
            if k is not None:
                chosen[number] = (states[k], states[k + 1] if local else None)
        for number, (state, following) in chosen.items():
            text, start = row.text(number, n=n), len(row.prompt) + number * n
            prefix = row.ids[:start]
            if window is not None:
                begin = number // window * window
                before = [chosen[b][0] if b in chosen else row.text(b, n=n) for b in range(begin, number)]
                prefix = row.ids[: len(row.prompt) + begin * n] + [token for block in before for token in block]
            places = [i for i in range(mismatch(state, text), len(text)) if start + i + 1 < len(row.ids)]
            if not places:
                continue
            labels = torch.tensor([row.ids[start + i + 1] for i in places])
            q = logits(student, prefix + state)[[start + i for i in places]].log_softmax(-1)
            read = row.ids if following is None else row.ids[:start] + following
            with torch.no_grad():
                p = logits(teacher or student, read)[[start + i for i in places]].log_softmax(-1)
            total, count = total + loss(p, q, labels).sum(), count + len(places)
    return total / max(1, count)


def plain_ar(
    student: nn.Module,
    rows: Sequence[Trajectory],
    *,
    replaced: Callable[[Trajectory], bool] = lambda row: False,
    teacher: nn.Module | None = None,
) -> Tensor:
    """Mean cross-entropy of the completions, or of the references in their place; forward KL to a ``teacher`` that is given."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in rows:
        completion = row.reference if replaced(row) else row.completion
        labels = torch.tensor(completion)
        ids, scored = row.prompt + completion, slice(len(row.prompt) - 1, -1)
        q = logits(student, ids)[scored].log_softmax(-1)
        if teacher is None:
            found = cross_entropy(q, q, labels)
        else:
            with torch.no_grad():
                p = logits(teacher, ids)[scored].log_softmax(-1)
            found = forward_kl(p, q, labels)
        total, count = total + found.sum(), count + len(labels)
    return total / count

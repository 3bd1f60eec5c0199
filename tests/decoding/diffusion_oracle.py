"""Decoding of one row of a diffusion language model written out: Python loops over tokens, numpy in float64, no cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

Read = Callable[[list[int | None]], np.ndarray]  # response (None: masked) -> probabilities [G, V], 0 for MASK


@dataclass
class View:
    """What a rule sees: ``probs`` {column: [V]} of the window's columns, ``masked`` those of them to choose from."""

    probs: dict[int, np.ndarray]
    masked: list[int]
    block: Callable[[int], int]
    current: int
    passes: int  # since the block is current, this one included
    blocks: int
    tokens: list[int | None]
    memory: dict[str, Any] = field(default_factory=dict)

    def proposal(self, c: int) -> int:
        return int(self.probs[c].argmax())


Rule = Callable[[View], dict[int, int]]  # column -> token


def entropy(p: np.ndarray) -> float:
    return -sum(float(x) * math.log(x) for x in p if x > 0)


def decode(
    read: Read, rule: Rule, *, G: int, n: int, live: int = 1, offset: int = 0, stops: tuple[int, ...] = (), fill: int = 0
) -> tuple[list[int], list[int], int]:
    """(tokens, commit steps, passes)."""
    tokens: list[int | None] = [None] * G
    when = [0] * G
    memory: dict[str, Any] = {}
    passes = since = 0
    before = -1

    def block(c: int) -> int:
        return (c + offset) // n

    while None in tokens:
        passes += 1
        probs = read(tokens)
        current = min(block(c) for c in range(G) if tokens[c] is None)
        since = since + 1 if current == before else 1
        before = current
        window = [c for c in range(G) if current <= block(c) < current + live]
        view = View(
            probs={c: probs[c] for c in window},
            masked=[c for c in window if tokens[c] is None],
            block=block,
            current=current,
            passes=since,
            blocks=block(G - 1) + 1,
            tokens=tokens,
            memory=memory,
        )
        for c, token in rule(view).items():
            tokens[c], when[c] = token, passes
        ends = [c for c in range(G) if tokens[c] in stops and tokens[c] is not None]
        if ends:
            for c in range(min(ends) + 1, G):
                tokens[c], when[c] = fill, 0
    return [int(t) for t in tokens if t is not None], when, passes


def quota(steps: int, score: Callable[[View, int], float]) -> Rule:
    def rule(view: View) -> dict[int, int]:
        columns = [c for c in range(len(view.tokens)) if view.block(c) == view.current]
        size, G = len(columns), len(view.tokens)
        mine = math.ceil(Fraction(steps * (columns[-1] + 1), G)) - math.ceil(Fraction(steps * columns[0], G))
        mine = max(mine, 1)
        count = size // mine + (1 if view.passes <= size % mine else 0)
        best = sorted(view.masked, key=lambda c: -score(view, c))
        return {c: view.proposal(c) for c in best[: max(count, 1)]}

    return rule


def largest(view: View, c: int) -> float:
    return float(view.probs[c].max())


def margin(view: View, c: int) -> float:
    first, second = sorted(view.probs[c].tolist())[-1:-3:-1]
    return first - second


def confident(threshold: float) -> Rule:
    def rule(view: View) -> dict[int, int]:
        best = max(view.masked, key=lambda c: largest(view, c))
        return {c: view.proposal(c) for c in view.masked if c == best or largest(view, c) >= threshold}

    return rule


def certain(threshold: float) -> Rule:
    def rule(view: View) -> dict[int, int]:
        best = min(view.masked, key=lambda c: entropy(view.probs[c]))
        return {c: view.proposal(c) for c in view.masked if c == best or entropy(view.probs[c]) <= threshold}

    return rule


def factor(f: float) -> Rule:
    def rule(view: View) -> dict[int, int]:
        chosen: dict[int, int] = {}
        for r, c in enumerate(sorted(view.masked, key=lambda c: -largest(view, c)), start=1):
            if r > 1 and largest(view, c) < 1 - f / (r + 1):
                break
            chosen[c] = view.proposal(c)
        return chosen

    return rule


def coherent(inner: Rule, history: int) -> Rule:
    def rule(view: View) -> dict[int, int]:
        seen = view.memory.setdefault("seen", {})
        for c, p in view.probs.items():
            seen.setdefault(c, []).append(p)
        means = {c: sum(seen[c][-history:]) / len(seen[c][-history:]) for c in view.probs}
        return inner(replace(view, probs=means))

    return rule


def slow_fast(inner: Rule, tolerance: float) -> Rule:
    def rule(view: View) -> dict[int, int]:
        last = view.memory.get("last", {})
        ready = []
        for c in view.masked:
            moved = 0.5 * float(np.abs(view.probs[c] - last[c]).sum()) if c in last else 2.0
            if view.block(c) == view.current or moved <= tolerance:
                ready.append(c)
        view.memory["last"] = dict(view.probs)
        return inner(replace(view, masked=ready))

    return rule


def multi_block(threshold: float, add: float, activate: float, blocks: int) -> Rule:
    def rule(view: View) -> dict[int, int]:
        columns: dict[int, list[int]] = {}
        for c in view.probs:
            columns.setdefault(view.block(c), []).append(c)

        def committed(k: int) -> float:
            if k < view.current:
                return 1.0
            return len([c for c in columns[k] if c not in view.masked]) / len(columns[k])

        last = view.memory.get("live", view.current)
        if committed(last) >= add and last + 1 < view.blocks and last + 1 < view.current + blocks:
            last += 1
        view.memory["live"] = last
        live = [c for c in view.masked if view.block(c) <= last]
        chosen = {c for c in live if entropy(view.probs[c]) <= threshold}
        chosen.add(min(live, key=lambda c: entropy(view.probs[c])))
        for k in range(view.current, last + 1):
            mine = [c for c in live if view.block(c) == k]
            if mine and not chosen & set(mine) and (k == view.current or committed(k - 1) >= activate):
                chosen.add(min(mine, key=lambda c: entropy(view.probs[c])))
                break
        return {c: view.proposal(c) for c in chosen}

    return rule


def guided(guess: Callable[[list[int]], int]) -> Rule:
    """``guess``: a guide's next token after a response's beginning."""

    def rule(view: View) -> dict[int, int]:
        best = max(view.masked, key=lambda c: largest(view, c))
        chosen = {best: view.proposal(best)}
        text = [view.proposal(c) if t is None and c in view.probs else t for c, t in enumerate(view.tokens)]
        for c in view.masked:
            if guess([t for t in text[:c] if t is not None]) != view.proposal(c):
                break
            chosen[c] = view.proposal(c)
        return chosen

    return rule

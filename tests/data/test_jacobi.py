"""States, schedules and the packed layout against plain Python loops over lists."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.data.jacobi import Block, JacobiCollator, Layout, Noisy, RowStates, Schedule, choose, noise_states, packed
from kdlib.streams import CLEAN, PADDING
from kdlib.types import Positions

PAD = 0


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Schedules


def test_progressive_noise_rises_evenly_over_each_window() -> None:
    schedule = Schedule(name="progressive", window_size=5, min_noise=0.2, max_noise=1.0)
    found = [schedule.target(number, draws()) for number in range(10)]
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0] * 2)


def test_reverse_noise_falls() -> None:
    schedule = Schedule(name="reverse", window_size=3)
    assert [schedule.target(number, draws()) for number in range(4)] == pytest.approx([1.0, 0.5, 0.0, 1.0])


def test_random_noise_takes_the_same_values_in_any_order() -> None:
    schedule, generator = Schedule(name="random", window_size=4, min_noise=0.1, max_noise=0.7), draws(3)
    found = [schedule.target(0, generator) for _ in range(200)]
    assert {round(target, 6) for target in found} == {0.1, 0.3, 0.5, 0.7}
    again = draws(3)
    assert [schedule.target(0, again) for _ in range(200)] == found


def test_a_window_of_one_block_has_the_least_noise() -> None:
    assert Schedule(name="progressive", window_size=1, min_noise=0.25).target(7, draws()) == 0.25


@given(st.lists(st.integers(0, 8), min_size=1, max_size=9), st.integers(0, 50))
def test_uniform_choice_is_a_state_that_differs(mismatches: list[int], seed: int) -> None:
    chosen = choose(np.array(mismatches), length=8, number=0, schedule=Schedule(), generator=draws(seed))
    wrong = [k for k, first in enumerate(mismatches) if first < 8]
    assert chosen in wrong if wrong else chosen is None


def test_uniform_choice_gives_every_such_state_its_turn() -> None:
    generator = draws()
    found = [
        choose(np.array([1, 8, 3, 5, 8]), length=8, number=0, schedule=Schedule(), generator=generator) for _ in range(900)
    ]
    assert {k: found.count(k) for k in set(found)} == {k: pytest.approx(300, abs=60) for k in (0, 2, 3)}


@given(st.lists(st.integers(0, 8), min_size=1, max_size=9), st.integers(0, 40), st.integers(1, 6))
def test_a_schedule_chooses_the_nearest_share_of_noise(mismatches: list[int], number: int, window: int) -> None:
    schedule = Schedule(name="progressive", window_size=window, min_noise=0.1, max_noise=0.9)
    chosen = choose(np.array(mismatches), length=8, number=number, schedule=schedule, generator=draws())
    target = 0.1 if window == 1 else 0.1 + 0.8 * (number % window) / (window - 1)
    distances = [abs((8 - first) / 8 - target) for first in mismatches]
    assert chosen is not None and distances[chosen] == pytest.approx(min(distances))


@pytest.mark.parametrize("name", ["uniform", "progressive", "reverse", "random"])
def test_a_block_without_states_to_choose_from_has_none(name: Any) -> None:
    empty = np.zeros(0, dtype=np.int64)
    assert choose(empty, length=1, number=3, schedule=Schedule(name=name), generator=draws()) is None


# States


def test_mismatches_are_the_first_places_that_differ() -> None:
    states = np.array([[5, 1, 2, 9], [5, 6, 2, 8], [5, 6, 7, 9], [5, 6, 7, 8]])
    assert Block(number=0, start=4, states=states).mismatches(np.array([5, 6, 7, 8])).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("block_size", [2, 5, 8])
def test_noise_states_begin_right_and_go_on_with_context(block_size: int) -> None:
    ids = np.array(random.Random(block_size).sample(range(1000), 163))
    made = noise_states(ids, span=(140, 161), block_size=block_size, generator=draws())
    assert [block.start for block in made.blocks] == list(range(140, 161, block_size))
    assert [block.number for block in made.blocks] == list(range(len(made.blocks)))
    for block in made.blocks:
        clean = ids[block.start : min(block.start + block_size, 161)].tolist()
        before = set(ids[block.start - 128 : block.start].tolist())
        assert len(block.states) == len(clean)
        for k, state in enumerate(block.states.tolist()):
            assert state[: k + 1] == clean[: k + 1]
            assert set(state[k + 1 :]) <= before
        assert block.mismatches(np.array(clean)).tolist() == list(range(1, len(clean) + 1)), "all ids differ"
    again = noise_states(ids, span=(140, 161), block_size=block_size, generator=draws())
    assert all(np.array_equal(a.states, b.states) for a, b in zip(made.blocks, again.blocks, strict=True))


def test_noise_of_a_text_without_a_prompt_comes_from_its_first_token() -> None:
    made = noise_states(np.array([7, 8, 9, 10]), span=(1, 4), block_size=3, generator=draws())
    assert made.blocks[0].states.tolist() == [[8, 7, 7], [8, 9, 7], [8, 9, 10]]


# Rows with stored trajectories

ROW = {
    "input_ids": [20, 21, 22, 1, 2, 3, 4, 5],
    "labels": [-100, -100, -100, 1, 2, 3, 4, 5],
    "sample_id": 77,
    "prompt_length": 3,
    "block_size": 3,
    "block": [0, 1],
    "states": [3, 2],
    "changed": [2, 1, 0, 1, 0],
    "changed_position": [1, 2, 2, 1],
    "changed_token": [9, 8, 7, 6],
    "reference_ids": [30, 31],
}


def test_stored_states_are_read_from_their_columns() -> None:
    plain = {"input_ids": [5, 6], "labels": [-100, 6], "sample_id": 78}
    batch = JacobiCollator(PAD, stored=True)([ROW, {**ROW, "block": [1], "states": [2], "changed": [1, 0], **_tail()}])
    first, second = batch["trajectory"]
    assert [(block.number, block.start, block.states.tolist()) for block in first.blocks] == [
        (0, 3, [[1, 9, 8], [1, 2, 7], [1, 2, 3]]),
        (1, 6, [[4, 6], [4, 5]]),
    ]
    assert [(block.number, block.start, block.states.tolist()) for block in second.blocks] == [(1, 6, [[4, 6], [4, 5]])]
    assert first.reference == (30, 31)
    assert batch["input_ids"].tolist()[0] == ROW["input_ids"]
    [found] = JacobiCollator(PAD)([plain])["trajectory"]
    assert found == RowStates(blocks=(), reference=())


def _tail() -> dict[str, Any]:
    return {"changed_position": [1], "changed_token": [6]}


# The layout, against what its docstrings say, in lists


class Plain:
    """A batch of rows as lists of (token, position, stream, clean_until), and the pairs that are scored."""

    def __init__(self) -> None:
        self.tokens: list[tuple[int, int, int, int]] = []
        self.consistency: list[tuple[int, int, int]] = []
        self.ar: list[tuple[int, int, int]] = []


def plain_row(
    ids: list[int], labels: list[int], *, width: int, noisy: list[Noisy], layout: Layout, reference: list[int]
) -> Plain:
    row, length = Plain(), len(ids)
    row.tokens = [(ids[i], i, CLEAN, 0) if i < length else (PAD, i, PADDING, 0) for i in range(width)]
    scored = [i for i in range(1, length) if labels[i] != -100]
    end = scored[-1] + 1 if scored else length
    start = end
    while start - 1 in scored:
        start -= 1
    for index, state in enumerate(noisy):
        tokens, first = [int(token) for token in state.tokens], state.start
        window = state.number // layout.window_size
        if layout.context == "noisy":
            stream, sees = 1 + window, start + window * layout.window_size * layout.block_size
        else:
            stream, sees = 1 + 2 * index, first
        column = len(row.tokens)
        row.tokens += [(token, first + i, stream, sees) for i, token in enumerate(tokens)]
        teacher = first
        if state.following is not None:
            teacher = len(row.tokens)
            row.tokens += [(int(token), first + i, 2 + 2 * index, first) for i, token in enumerate(state.following)]
        differs = False
        for i, token in enumerate(tokens):
            differs = differs or token != ids[first + i]
            if differs and first + i + 1 < end:  # what it predicts is still of the completion
                row.consistency.append((column + i, teacher + i, ids[first + i + 1]))
    replaced = range(start, end) if reference and scored else range(0)
    if reference and scored:
        before = start - 1
        for i, token in enumerate(reference):
            row.ar.append((before, before, token))
            before = len(row.tokens)
            row.tokens.append((token, start + i, -2, start))
    row.ar += [(i - 1, i - 1, labels[i]) for i in scored if i not in replaced]
    return row


def triples(where: Positions, *, row: int, width: int) -> list[tuple[int, int, int]]:
    assert where.teacher_index is not None
    own = (where.sequence == row).nonzero()[:, 0]
    columns = zip(
        (where.index[own] - row * width).tolist(),
        (where.teacher_index[own] - row * width).tolist(),
        where.labels[own].tolist(),
        strict=True,
    )
    return sorted(columns)


def random_row(rng: random.Random, *, block_size: int, context: str, local: bool) -> tuple[list[int], list[int], list[Noisy]]:
    """Up to two scored spans, what follows the last, states of the last span's blocks; few different ids."""
    kind = rng.choice(["one", "two", "text", "none"])
    prompt, last, tail = rng.randrange(1, 5), rng.randrange(1, 12), rng.randrange(0, 3)
    turns = {
        "one": [(prompt, False), (last, True)],
        "two": [(prompt, False), (rng.randrange(1, 4), True), (rng.randrange(1, 3), False), (last, True)],
        "text": [(last + 1, True)],
        "none": [(prompt + last, False)],
    }[kind]
    flags = [scored for count, scored in [*turns, (tail, False)] for _ in range(count)]
    ids = [rng.randrange(1, 4) for _ in flags]
    labels = [token if scored and i else -100 for i, (token, scored) in enumerate(zip(ids, flags, strict=True))]
    if kind == "none":
        return ids, labels, []
    end = max(i for i, label in enumerate(labels) if label != -100) + 1
    start = 1 if kind == "text" else end - last
    noisy = []
    for number, first in enumerate(range(start, end, block_size)):
        v = min(block_size, end - first)
        if context == "clean" and rng.random() < 0.2:
            continue  # a block that was not chosen
        tokens, following = (np.array([ids[first]] + [rng.randrange(1, 4) for _ in range(v - 1)]) for _ in range(2))
        noisy.append(Noisy(number=number, start=first, tokens=tokens, following=following if local else None))
    return ids, labels, noisy


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from(["clean", "noisy", "local"]))
def test_the_layout_is_the_plain_one(seed: int, kind: str) -> None:
    rng = random.Random(seed)
    block_size, context = rng.randrange(2, 5), "noisy" if kind == "noisy" else "clean"
    layout = Layout(block_size=block_size, context=context, window_size=rng.randrange(1, 4))
    rows = [random_row(rng, block_size=block_size, context=context, local=kind == "local") for _ in range(rng.randrange(1, 5))]
    references = [[rng.randrange(1, 9) for _ in range(rng.choice([0, 0, 1, 4]))] for _ in rows]
    S = max(len(ids) for ids, _, _ in rows) + rng.randrange(2)
    batch = {
        "input_ids": torch.tensor([ids + [PAD] * (S - len(ids)) for ids, _, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (S - len(labels)) for _, labels, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (S - len(ids)) for ids, _, _ in rows]),
    }
    made = packed(batch, [noisy for *_, noisy in rows], layout=layout, references=references, pad_token_id=PAD)
    plain = [
        plain_row(ids, labels, width=S, noisy=noisy, layout=layout, reference=reference)
        for (ids, labels, noisy), reference in zip(rows, references, strict=True)
    ]
    width = max(len(row.tokens) for row in plain)
    assert made["input_ids"].shape == (len(rows), width)
    for number, row in enumerate(plain):
        wanted = row.tokens + [(PAD, 0, PADDING, 0)] * (width - len(row.tokens))
        names = ("input_ids", "position_ids", "stream", "clean_until")
        assert list(zip(*(made[name][number].tolist() for name in names), strict=True)) == wanted
        assert made["attention_mask"][number].tolist() == [int(stream != PADDING) for _, _, stream, _ in wanted]
        for name, expected in (("consistency", row.consistency), ("ar", row.ar)):
            assert triples(made["positions"][name], row=number, width=width) == sorted(expected), name


def test_a_small_layout_by_hand() -> None:
    """Text 1 2 | 3 4 5 6 with blocks of 2: state 3 9 is wrong from its second place on, state 5 6 is the text."""
    batch = {
        "input_ids": torch.tensor([[1, 2, 3, 4, 5, 6]]),
        "labels": torch.tensor([[-100, -100, 3, 4, 5, 6]]),
        "attention_mask": torch.ones(1, 6, dtype=torch.long),
    }
    noisy = [Noisy(number=0, start=2, tokens=np.array([3, 9])), Noisy(number=1, start=4, tokens=np.array([5, 6]))]
    made = packed(batch, [noisy], layout=Layout(block_size=2), references=[()], pad_token_id=PAD)
    assert made["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 3, 9, 5, 6]]
    assert made["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 2, 3, 4, 5]]
    assert made["clean_until"].tolist() == [[0] * 6 + [2, 2, 4, 4]]
    consistency, ar = made["positions"]["consistency"], made["positions"]["ar"]
    assert (consistency.index.tolist(), consistency.teacher_index.tolist(), consistency.labels.tolist()) == ([7], [3], [5])
    assert (ar.index.tolist(), ar.labels.tolist()) == ([1, 2, 3, 4], [3, 4, 5, 6])

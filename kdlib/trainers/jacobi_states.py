"""From a step's rows to the states that it trains on: a draw keyed by seed, step and sample."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdlib.data.draft import last_span
from kdlib.data.jacobi import Block, Noisy, RowStates, choose, noise_states
from kdlib.decoding import packed_states
from kdlib.keys import draw_key
from kdlib.trainers.jacobi_config import JacobiConfig

STUDENT = 1  # keeps the seeds of a model's first guesses apart from those of choices

Batch = dict[str, Any]
Spans = Sequence[tuple[int, int]]


def spans(batch: Batch) -> list[tuple[int, int]]:
    """Where each row's last completion starts and ends."""
    lengths = batch["attention_mask"].sum(-1).tolist()
    return [last_span(labels[:length]) for labels, length in zip(batch["labels"].tolist(), lengths, strict=True)]


def student_states(model: Any, batch: Batch, where: Spans, args: JacobiConfig, *, step: int) -> list[RowStates]:
    """The states that ``model`` itself goes through on the rows' text; one packed pass for each iteration."""
    rows = [row for row, (start, end) in enumerate(where) if start < end]
    found = list(batch["trajectory"])
    if not rows:
        return found
    width = max(where[row][1] for row in rows)
    device = next(model.parameters()).device
    columns = torch.arange(width)
    ends = torch.tensor([where[row][1] for row in rows])
    made = packed_states(
        model,
        batch["input_ids"][rows, :width].to(device),
        attention_mask=(columns < ends[:, None]).long().to(device),
        prompt_lengths=torch.tensor([where[row][0] for row in rows], device=device),
        block_size=args.block_size,
        init=args.init,
        seeds=[draw_key(args.seed, step, batch["sample_id"][row].item(), STUDENT) for row in rows],
    )
    states, lengths, iterations = (x.cpu().numpy() for x in (made.states, made.lengths, made.iterations))
    for place, row in enumerate(rows):
        kept = [
            Block(
                number=number,
                start=where[row][0] + number * args.block_size,
                states=states[: iterations[place, number], place, number, :length],
            )
            for number, length in enumerate(lengths[place])
            if length
        ]
        found[row] = RowStates(blocks=tuple(kept), reference=found[row].reference)
    return found


def noise(batch: Batch, where: Spans, args: JacobiConfig, *, step: int) -> list[RowStates]:
    """States without a model."""
    found = []
    for ids, span, sample, known in zip(
        batch["input_ids"].cpu().numpy(), where, batch["sample_id"].tolist(), batch["trajectory"], strict=True
    ):
        generator = np.random.default_rng(draw_key(args.seed, step, sample, STUDENT))
        made = noise_states(ids, span=span, block_size=args.block_size, generator=generator)
        found.append(RowStates(blocks=made.blocks, reference=known.reference))
    return found


def chosen(batch: Batch, where: Spans, rows: Sequence[RowStates], args: JacobiConfig, *, step: int) -> list[list[Noisy]]:
    """Each row's states of this step."""
    ids = batch["input_ids"].cpu().numpy()
    keyed = zip(ids, where, batch["sample_id"].tolist(), rows, strict=True)
    return [
        _of_row(own, span, row, args, generator=np.random.default_rng(draw_key(args.seed, step, sample)))
        for own, span, sample, row in keyed
    ]


def _of_row(
    ids: NDArray[Any], span: tuple[int, int], row: RowStates, args: JacobiConfig, *, generator: np.random.Generator
) -> list[Noisy]:
    if span[0] == span[1]:
        return []
    blocks = list(row.blocks)
    if args.blocks_per_row is not None and len(blocks) > args.blocks_per_row:
        blocks = [blocks[i] for i in sorted(generator.choice(len(blocks), args.blocks_per_row, replace=False))]
    if args.context == "noisy":
        return _windows(ids, span, blocks, args, generator=generator)
    picked = [_pick(ids, block, args, generator=generator) for block in blocks for _ in range(args.states_per_block)]
    return [state for state in picked if state is not None]


def _windows(
    ids: NDArray[Any], span: tuple[int, int], blocks: Sequence[Block], args: JacobiConfig, *, generator: np.random.Generator
) -> list[Noisy]:
    """A state of every block, so that windows have no holes; a block without states stands as its text, which has no loss."""
    known, n, (start, end) = {block.number: block for block in blocks}, args.block_size, span
    found = []
    for number, first in enumerate(range(start, end, n)):
        clean = Noisy(number=number, start=first, tokens=ids[first : min(first + n, end)])
        picked = _pick(ids, known[number], args, generator=generator) if number in known else None
        found.append(picked or clean)
    return found


def _pick(ids: NDArray[Any], block: Block, args: JacobiConfig, *, generator: np.random.Generator) -> Noisy | None:
    v = block.states.shape[1]
    mismatches = block.mismatches(ids[block.start : block.start + v])
    local = args.consistency == "local"
    k = choose(
        mismatches[: len(mismatches) - local],  # the last state has none after it
        length=v,
        number=block.number,
        schedule=args.noise_schedule,
        generator=generator,
    )
    if k is None:
        return None
    following = block.states[k + 1] if local else None
    return Noisy(number=block.number, start=block.start, tokens=block.states[k], following=following)


def references(batch: Batch, where: Spans, rows: Sequence[RowStates], args: JacobiConfig) -> list[tuple[int, ...]]:
    """What the auto-regressive term learns in place of each row's completion; () keeps it.

    ``mixed`` is CEED-VLA's supervision with a distance for text: 1 - 2 M / (a + b), M tokens in matching runs of sequences of a
    and b tokens; its own is between actions, and its threshold is not published.
    """
    if args.ar_labels in ("trajectory", "teacher"):
        return [()] * len(rows)
    ids = batch["input_ids"].tolist()
    return [
        row.reference if args.ar_labels == "dataset" or _distance(own[start:end], row.reference) > args.max_distance else ()
        for own, (start, end), row in zip(ids, where, rows, strict=True)
    ]


def _distance(own: Sequence[int], reference: Sequence[int]) -> float:
    return 1.0 - difflib.SequenceMatcher(None, own, reference, autojunk=False).ratio() if reference else 0.0

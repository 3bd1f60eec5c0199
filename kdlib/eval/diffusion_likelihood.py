"""Monte-Carlo likelihoods of texts under a masked diffusion language model.

A masked model has no likelihood in closed form. What is estimated is its bound, the mean over all orders in which the scored
tokens can be uncovered one by one: log p(x) >= E_k E_M [T / k * sum_{i in M} log q(x_i | x outside of M)] with k uniform on
1..T and M uniform among the sets of k of the T scored tokens (LLaDA, arXiv 2502.09992, appendix B.5). Drawing k without
replacement within a text (strata) and M without replacement within the scored tokens leaves it unbiased.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from kdlib.data.draft import sample_id
from kdlib.diffusion import DiffusionSpec
from kdlib.head import Head
from kdlib.keys import draw_key
from kdlib.models import hidden_states
from kdlib.streams import CLEAN, PADDING

CHUNK = 256  # rows of logits [CHUNK, V] held at a time


@dataclass(frozen=True, kw_only=True)
class Text:
    """``ids`` of which those at the positions ``scored``, ascending, are predicted from all others."""

    ids: list[int]
    scored: list[int]


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is masked at once: all scored tokens of text number ``text``, or those of one block behind clean earlier ones."""

    text: int
    ids: Tensor
    scored: Tensor
    order: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Draw:
    """One set of masked tokens of part number ``part``, whose sum of log-probabilities counts ``weight`` times."""

    part: int
    masked: Tensor
    weight: float


@torch.no_grad()
def log_likelihoods(
    model: Any,
    texts: Sequence[Text],
    *,
    spec: DiffusionSpec,
    vocab_size: int,
    samples: int = 128,
    batch_size: int = 8,
    seed: int = 0,
    desc: str | None = None,
) -> Tensor:
    """[texts] float64: estimated bounds of log p(scored tokens | the others), in nats, exact where one token is scored.

    ``samples`` masks for each text, or for each of its blocks where attention is block-causal (earlier blocks are then clean);
    their draws follow from ``seed`` and the text alone. ``vocab_size``: entries of the head that share the probability.
    ``batch_size``: rows of a pass. ``desc``: name of a progress bar. The model is expected in evaluation mode.

    Raises ValueError for a text without scored tokens, and where the spec is shifted and the first token is scored.
    """
    _check(texts, spec=spec, samples=samples)
    parts = [part for number, text in enumerate(texts) for part in _parts(text, number=number, spec=spec)]
    parts.sort(key=lambda part: -len(part.ids))
    head = Head.of(model, vocab_size=vocab_size)
    found = torch.zeros(len(texts), dtype=torch.float64)
    draws = _draws(parts, samples=samples, seed=seed)
    with tqdm(total=len(texts), desc=desc, unit="text", disable=desc is None) as bar:
        done = 0.0
        for batch in _batched(draws, batch_size):
            found.index_add_(0, torch.tensor([parts[d.part].text for d in batch]), _of(model, head, parts, batch, spec=spec))
            done = (1 + batch[-1].part) * len(texts) / len(parts)
            bar.update(int(done) - bar.n)
    return found


def _check(texts: Sequence[Text], *, spec: DiffusionSpec, samples: int) -> None:
    if samples < 1:
        raise ValueError(f"mc_samples must be at least 1, not {samples}")
    for number, text in enumerate(texts):
        if not text.scored:
            raise ValueError(f"text {number} has no scored tokens: leave it out")
        if spec.shift and text.scored[0] == 0:
            raise ValueError(f"text {number} begins with a scored token, which nothing predicts: put a prompt or bos before it")


def _parts(text: Text, *, number: int, spec: DiffusionSpec) -> Iterator[Part]:
    """The text as a whole, or block by block: what is behind a block is not seen by it and left off."""
    ids, scored = torch.tensor(text.ids), torch.tensor(text.scored)
    if spec.attention != "block_causal":
        yield Part(text=number, ids=ids, scored=scored, order=None)
        return
    block = _blocks(len(ids), start=text.scored[0], spec=spec)
    for current in block[scored].unique().tolist():
        end = int((block <= current).sum())
        yield Part(text=number, ids=ids[:end], scored=scored[block[scored] == current], order=block[:end])


def _blocks(length: int, *, start: int, spec: DiffusionSpec) -> Tensor:
    """[length] the block of each token; a prompt of ``start`` tokens is block 0 where blocks begin at the response."""
    assert spec.block_length is not None
    column = torch.arange(length)
    if spec.blocks_from == "sequence":
        return column // spec.block_length
    return torch.where(column < start, 0, 1 + (column - start) // spec.block_length)


def _draws(parts: Sequence[Part], *, samples: int, seed: int) -> Iterator[Draw]:
    """``samples`` sets of each part's scored tokens: sizes spread evenly over 1..T from a random start."""
    for number, part in enumerate(parts):
        total = len(part.scored)
        draws = samples if total > 1 else 1
        generator = torch.Generator().manual_seed(draw_key(seed, sample_id(part.ids.tolist(), part.scored.tolist())))
        start = torch.randint(total, (), generator=generator)
        size = (start + torch.arange(draws) * total // draws) % total + 1
        rank = torch.rand(draws, total, generator=generator).argsort(-1).argsort(-1)
        chosen = rank < size[:, None]
        weight = (total / (size * draws).double()).tolist()
        for row in range(draws):
            yield Draw(part=number, masked=part.scored[chosen[row]], weight=weight[row])


def _batched(draws: Iterable[Draw], size: int) -> Iterator[list[Draw]]:
    left = iter(draws)
    while batch := list(islice(left, size)):
        yield batch


def _of(model: Any, head: Head, parts: Sequence[Part], batch: Sequence[Draw], *, spec: DiffusionSpec) -> Tensor:
    """[b] weighted log-probabilities of each draw's masked tokens, on the CPU."""
    device = next(model.parameters()).device
    ids = pad_sequence([parts[draw.part].ids for draw in batch], batch_first=True)
    row = torch.cat([torch.full_like(draw.masked, number) for number, draw in enumerate(batch)])
    column = torch.cat([draw.masked for draw in batch])
    target = ids[row, column].to(device)
    assert spec.mask_token_id is not None
    inputs = {"input_ids": ids.index_put((row, column), torch.tensor(spec.mask_token_id)), **_seen(parts, batch)}
    states = hidden_states(model, {name: value.to(device) for name, value in inputs.items()})[0]
    states = states[row.to(device), (column - int(spec.shift)).to(device)]
    nats = [
        cross_entropy(head(states[i : i + CHUNK]), target[i : i + CHUNK], reduction="none") for i in range(0, len(row), CHUNK)
    ]
    weight = torch.tensor([draw.weight for draw in batch], dtype=torch.float64)
    return torch.zeros(len(batch), dtype=torch.float64).index_add_(0, row, -torch.cat(nats).double().cpu() * weight[row])


def _seen(parts: Sequence[Part], batch: Sequence[Draw]) -> dict[str, Tensor]:
    """Which tokens see which: all of their row, or those up to their own block."""
    lengths = torch.tensor([len(parts[draw.part].ids) for draw in batch])
    column = torch.arange(int(lengths.max())).expand(len(batch), -1)
    visible = column < lengths[:, None]
    orders = [order for draw in batch if (order := parts[draw.part].order) is not None]
    if not orders:
        return {"attention_mask": visible.long()}
    return {
        "position_ids": column,
        "order": pad_sequence(orders, batch_first=True),
        "stream": torch.where(visible, CLEAN, PADDING),
        "clean_until": torch.zeros_like(column),
    }

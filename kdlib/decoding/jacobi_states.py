"""Jacobi trajectories of texts that are known: every block of every row iterated in the same forward passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from kdlib.decoding.jacobi_init import Init, Unknown, first_guess
from kdlib.decoding.sampling import uniforms
from kdlib.head import Head
from kdlib.models import evaluating, inner
from kdlib.streams import CLEAN, PADDING, Streams, attention_mask

_LOGITS_AT_ONCE = 2**25


@dataclass(frozen=True, kw_only=True)
class PackedStates:
    """Jacobi states of M blocks of n tokens in each of B rows.

    ``states`` [K, B, M, n]: state 0 is the initial one, a block that no longer changes repeats its last; columns beyond the
    block's length say nothing. ``lengths`` [B, M]: tokens of a block, 0 where a row has no such block. ``iterations`` [B, M]:
    passes until the block no longer changed, the one that shows it included. ``converged`` [B, M]: the last state is the text.
    ``forwards``: passes that were made, without the one over the text, which says by itself that a block is stable.
    """

    states: Tensor
    lengths: Tensor
    iterations: Tensor
    converged: Tensor
    forwards: int


@torch.no_grad()
def packed_states(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    prompt_lengths: Tensor,
    block_size: int,
    init: Init = "prompt",
    max_iterations: int | None = None,
    seeds: Sequence[int] | None = None,
) -> PackedStates:
    """The states s^0, s^1, ... of each block, s^{k+1}_i = argmax p(. | x, y before the block, s^k_<i), for rows x ++ y.

    ``input_ids`` [B, S] right-padded, the prompt's ``prompt_lengths`` [B] first; block b holds tokens b n .. b n + n - 1 of y,
    of which the first is known. Given y, a block depends on the text before it and on its own draft alone, so all of them share
    each pass. What a state has in common with the text at its beginning is read once, with the text; a pass reads the rest.
    ``max_iterations``: None runs until no block changes (at most n passes).
    ``seeds`` [B]: of ``init`` random; None: 0 for all. Raises ValueError for a block size below 2, an empty prompt, a row
    without tokens after it, and a model that cannot read several streams at once (``kdlib.streams``).
    """
    text = _Text.of(input_ids, attention_mask, prompt_lengths, block_size=block_size)
    with evaluating(model):
        passes = _Passes(model, text)
        states = [text.guess(init, seeds)]
        iterations = torch.zeros_like(text.lengths)
        changing = text.lengths > 0
        for _ in range(block_size if max_iterations is None else max_iterations):
            iterations += changing
            following = passes.step(states[-1])
            changing = ((following != states[-1]) & text.valid).any(-1)
            if not changing.any():
                break
            states.append(following)
    converged = ((states[-1] == text.blocks) | ~text.valid).all(-1) & (text.lengths > 0)
    return PackedStates(
        states=torch.stack(states),
        lengths=text.lengths,
        iterations=iterations,
        converged=converged,
        forwards=passes.made,
    )


@dataclass(frozen=True, kw_only=True)
class _Text:
    """``ids`` [B, S] with the rows' lengths [B], and the blocks [B, M, n] in it: their columns, tokens, and lengths [B, M]."""

    ids: Tensor
    row_lengths: Tensor
    prompt_lengths: Tensor
    columns: Tensor
    blocks: Tensor
    lengths: Tensor

    @staticmethod
    def of(ids: Tensor, mask: Tensor | None, prompt_lengths: Tensor, *, block_size: int) -> _Text:
        rows = torch.full_like(ids[:, 0], ids.shape[1]) if mask is None else mask.sum(1)
        prompts = prompt_lengths.to(ids)
        _check(rows - prompts, prompts, block_size=block_size)
        count = -(-int((rows - prompts).max()) // block_size)
        first = torch.arange(count, device=ids.device) * block_size
        lengths = (rows[:, None] - prompts[:, None] - first).clamp(0, block_size)
        columns = prompts[:, None, None] + first[:, None] + torch.arange(block_size, device=ids.device)
        columns = columns.clamp(max=ids.shape[1] - 1)  # beyond a row's end: not read
        blocks = ids.gather(1, columns.flatten(1)).view(columns.shape)
        return _Text(ids=ids, row_lengths=rows, prompt_lengths=prompts, columns=columns, blocks=blocks, lengths=lengths)

    @property
    def valid(self) -> Tensor:
        """[B, M, n]: which places of the blocks hold a token."""
        return torch.arange(self.blocks.shape[2], device=self.ids.device) < self.lengths[..., None]

    def guess(self, init: Init, seeds: Sequence[int] | None) -> Tensor:
        """The initial state of every block [B, M, n]: its known first token, then ``init``."""
        batch, count, n = self.blocks.shape
        longest = int(self.prompt_lengths.max())
        place = torch.arange(longest, device=self.ids.device) - (longest - self.prompt_lengths[:, None])
        draws = [uniforms(seed, count * n) for seed in (seeds if seeds is not None else [0] * batch)]
        unknown = Unknown(
            prompts=self.ids.gather(1, place.clamp(min=0)),
            lengths=self.prompt_lengths,
            position=torch.arange(count * n, device=self.ids.device).expand(batch, -1),
            last=self.blocks[:, :, :1].expand(-1, -1, n).flatten(1),
            uniform=torch.stack(draws).to(self.ids.device),
        )
        guessed = first_guess(init, unknown).view(self.blocks.shape)
        return torch.cat([self.blocks[:, :, :1], guessed[:, :, 1:]], -1)

    def clean(self) -> Streams:
        """The text's own columns [B, S]."""
        position = torch.arange(self.ids.shape[1], device=self.ids.device).expand(self.ids.shape)
        stream = torch.where(position < self.row_lengths[:, None], CLEAN, PADDING)
        return Streams(position=position, stream=stream, clean_until=torch.zeros_like(position))


class _Passes:
    """What the model makes of the text, and one Jacobi step of all blocks at a time."""

    def __init__(self, model: nn.Module, text: _Text) -> None:
        self._base, self._text, self._clean = inner(model), text, text.clean()
        self._decoder, self._head, self.made = self._base.get_decoder(), Head.of(self._base), 0
        # columns of no stream, to hear of a model that cannot do this before it reads anything
        attention_mask(self._base.config, queries=self._clean[:0], keys=self._clean[:0])
        self._cache = DynamicCache()  # without the configuration no layer forgets columns outside its window
        hidden = self._read(text.ids, mask=(self._clean.stream == CLEAN).long(), position=self._clean.position)
        inside = text.valid[:, :, 1:]
        before = hidden.gather(1, (text.columns[:, :, 1:] - 1).flatten(1)[..., None].expand(-1, -1, hidden.shape[-1]))
        self._choice = text.blocks.clone()  # [B, M, n]: what the model says after the text itself
        self._choice[:, :, 1:][inside] = self._likeliest(before[inside.flatten(1)])

    def step(self, state: Tensor) -> Tensor:
        """[B, M, n] -> [B, M, n]: the first token stays, each other is the likeliest one after those before it."""
        place = torch.arange(state.shape[2], device=state.device)
        same = ((state == self._text.blocks) & self._text.valid).long().cumprod(-1).sum(-1, keepdim=True)
        read = (place >= same) & (place < self._text.lengths[..., None] - 1)  # nothing follows a block's last token
        following = torch.where(place <= same, self._choice, state).flatten(1)
        if read.any():
            order, used = _packed(read.flatten(1))
            drafts = self._drafts(same.expand(state.shape).flatten(1).gather(1, order), order, used)
            hidden = self._read(state.flatten(1).gather(1, order), mask=self._mask(drafts), position=drafts.position)
            self._cache.crop(-order.shape[1])
            self.made += 1
            following[used.nonzero()[:, 0], order[used] + 1] = self._likeliest(hidden[used])
        return following.view(state.shape)

    def _drafts(self, same: Tensor, order: Tensor, used: Tensor) -> Streams:
        """The columns [B, Q] that a pass reads: block b is stream b + 1 and sees the text where it agrees with it."""
        n = self._text.blocks.shape[2]
        position = self._text.columns.flatten(1).gather(1, order)
        columns = {
            "position": (position, 0),
            "stream": (order // n + 1, PADDING),
            "clean_until": (position - order % n + same, 0),
        }
        return Streams(**{name: torch.where(used, value, other) for name, (value, other) in columns.items()})

    def _mask(self, drafts: Streams) -> Any:
        keys = Streams(**{name: torch.cat([x, getattr(drafts, name)], 1) for name, x in vars(self._clean).items()})
        return attention_mask(self._base.config, queries=drafts, keys=keys)

    def _read(self, ids: Tensor, *, mask: Any, position: Tensor) -> Tensor:
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position}
        hidden: Tensor = self._decoder(**inputs, past_key_values=self._cache, use_cache=True).last_hidden_state
        return hidden

    def _likeliest(self, hidden: Tensor) -> Tensor:
        """[N, D] -> [N] argmax over the vocabulary; [N, V] is made in chunks."""
        chunk = max(1, _LOGITS_AT_ONCE // self._head.out_features)
        # rounded as the model rounds its logits: among those equal then, the same one has to come out
        found = [self._head(rows).to(hidden.dtype).argmax(-1) for rows in hidden.split(chunk)]
        return torch.cat(found)


def _packed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``chosen`` [B, L] the columns in order, filled up with others to the longest row: (columns, chosen) [B, Q] each."""
    count = chosen.sum(1)
    order = chosen.long().argsort(dim=1, descending=True, stable=True)[:, : int(count.max())]
    return order, torch.arange(order.shape[1], device=chosen.device) < count[:, None]


def _check(completion_lengths: Tensor, prompt_lengths: Tensor, *, block_size: int) -> None:
    if block_size < 2:
        raise ValueError(f"block_size {block_size}: a block needs a known token and at least one to find, so 2 or more")
    if (prompt_lengths < 1).any():
        raise ValueError(
            f"row {int(prompt_lengths.argmin())} has no prompt: give at least one token, for example the bos token"
        )
    if (completion_lengths < 1).any():
        raise ValueError(f"row {int(completion_lengths.argmin())} has no tokens after its prompt: nothing to iterate")

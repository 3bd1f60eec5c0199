"""The loop of Jacobi decoding: prompts, passes, and what stands in the buffers between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kdlib.decoding.cache import CachedModel
from kdlib.decoding.emitted import Emitted, leading
from kdlib.decoding.jacobi_init import Unknown, first_guess
from kdlib.decoding.jacobi_options import JacobiOptions
from kdlib.decoding.jacobi_pool import NgramPool
from kdlib.decoding.jacobi_trace import Trace
from kdlib.decoding.sampling import context_length, uniforms


class Jacobi:
    """One call's state: of all B prompts, and of the b rows that go on (``emitted.rows``).

    A row's buffer holds ``width`` [b] tokens d_0, d_1, ...: new tokens number ``start`` [b], start + 1, ... The first max(1,
    ``forced`` [b]) of them are known, the others guesses; none has its keys in the cache. ``_ids`` [c, W], c >= b, are the
    buffers and, with a pool, other guesses beside some of them: ``_places`` [c, 2] says of which row, and its number there (0:
    the buffer itself). With g_i = argmax after d_i and m the first i with d_{i+1} != g_i, d_0 .. d_m are exact, and so is g_m,
    which comes after them.
    """

    def __init__(self, model: Any, *, options: JacobiOptions, stop_ids: Sequence[int], seeds: Sequence[int]) -> None:
        self.model, self.options, self.stop_ids = model, options, stop_ids
        self.device = next(model.parameters()).device
        places = options.max_new_tokens + options.columns
        if options.init in ("prompt", "last"):
            self.uniform = torch.zeros((), device=self.device).expand(len(seeds), places)
        else:
            self.uniform = torch.stack([uniforms(seed, places) for seed in seeds]).to(self.device)
        self.trace = Trace() if options.return_trajectories else None

    def run(self, input_ids: Tensor, *, padding: Tensor) -> None:
        """Continues ``input_ids`` [B, S], of which ``padding`` [B] (CPU) columns on the left are unused."""
        self._reset(input_ids, padding=padding)
        first = self.cached.read(input_ids, logits_to_keep=1)[0].argmax(-1)
        every = torch.arange(len(first), device=self.device)
        going = self._advance(input_ids[:, -1:], first, matched=torch.zeros_like(every), source=every)
        while going:
            going = self._pass()

    def _reset(self, input_ids: Tensor, *, padding: Tensor) -> None:
        size, options = len(input_ids), self.options
        self.prompts, self.prompt_lengths = input_ids, (input_ids.shape[1] - padding).to(self.device)
        self.emitted = Emitted(
            self.prompt_lengths,
            max_tokens=options.max_new_tokens,
            context=context_length(self.model),
            stop_ids=self.stop_ids,
            spare=options.columns,
        )
        self.cached = CachedModel(self.model, padding=padding)
        self.pool = NgramPool(size, size=options.pool, n=options.block_size, device=self.device)
        self.forwards, self.passes = 0, torch.zeros_like(self.prompt_lengths)
        self.iterations = self.passes.new_zeros(size, -(-options.max_new_tokens // options.block_size))
        # the prompt's pass is one over its last token, which comes before the first new one
        self.start, self.width, self.forced = self.passes - 1, self.passes + 1, self.passes

    def _pass(self) -> bool:
        """One pass over all buffers, and what follows from it; whether any row goes on."""
        rows = self.emitted.rows
        self.forwards += 1
        self.passes[rows] += 1
        self.iterations[rows, self._block()] += 1
        if self.trace is not None:
            self.trace.add(self._ids, rows=rows, start=self.start, width=self.width)
        greedy = self.cached.read(self._ids)[0].argmax(-1)
        matched = self._matched(greedy)
        source = self._longest(matched)
        return self._advance(self._ids[source], greedy[source], matched=matched[source], source=source)

    def _block(self) -> Tensor:
        """The block of each row's first token that is not settled [b]."""
        return (self.start + self.forced) // self.options.block_size

    def _matched(self, greedy: Tensor) -> Tensor:
        """m [c]: how many of d_1, d_2, ... are what the model says, those that were taken as they were included."""
        of = self._places[:, 0]
        columns = torch.arange(1, greedy.shape[1], device=self.device)
        same = (self._ids[:, 1:] == greedy[:, :-1]) | (columns < self.forced[of, None])
        return leading(same & (columns < self.width[of, None]))

    def _longest(self, matched: Tensor) -> Tensor:
        """Of each row [b], which of ``_ids`` matched furthest, the buffer itself among equals."""
        of, which = self._places.T
        table = matched.new_full((2, len(self.emitted.rows), self.options.pool + 1), -1)
        table[0, of, which], table[1, of, which] = matched, torch.arange(len(matched), device=self.device)
        return table[1].gather(1, table[0].argmax(1, keepdim=True))[:, 0]

    def _advance(self, ids: Tensor, greedy: Tensor, *, matched: Tensor, source: Tensor) -> bool:
        """Takes up what a pass over ``ids`` [b, W] found, and forms the next buffers; whether any row goes on.

        ``greedy`` [b, W]: the argmax after each; ``source`` [b]: which rows of the cache these are.
        """
        exits = self._exits(matched)
        taken = torch.where(exits, self.width - 2, matched)  # the last of ``greedy`` that counts as known
        width = self._next_width(ids, greedy, matched=matched, exits=exits)
        buffers, some = self._buffers(greedy, matched=matched, taken=taken, width=width)
        known = (self.forced - 1).clamp(min=0)
        new = _from(greedy, known, n=greedy.shape[1])
        beside = torch.cat([torch.stack([source, matched, width], dim=1), some.long()], dim=1)
        kept, beside = self.emitted.take(new, accepted=taken - known, beside=beside)
        if len(kept) == 0:
            return False
        places = beside[:, 3:].nonzero()
        source, matched_there = beside[places[:, 0], :2].T
        self.cached.go_back(source, tokens=greedy.shape[1] - 1 - matched_there)
        alive, self._places = kept.to(self.device), places.to(self.device)
        self.forced = torch.where(exits, taken - matched + 1, 0)[alive]
        self.start, self.width = (self.start + matched + 1)[alive], width[alive]
        self.pool.keep(alive)
        of, which = self._places.T
        self._ids = buffers[alive[of], which, : int(beside[:, 2].max())]
        return True

    def _exits(self, matched: Tensor) -> Tensor:
        """Whose block has had its passes and is taken as it is [b]."""
        if self.options.max_iterations is None:
            return torch.zeros_like(matched, dtype=torch.bool)
        used = self.iterations[self.emitted.rows, self._block()]
        return (used >= self.options.max_iterations) & (matched < self.width - 1)

    def _next_width(self, ids: Tensor, greedy: Tensor, *, matched: Tensor, exits: Tensor) -> Tensor:
        """The buffers' next ``width`` [b]: what is left of their blocks, and a new block when it is time for one.

        That is when there are fewer than ``blocks`` and ``spawn_ratio`` of the newest one is accepted: known, or, where the
        exact tokens have not come so far, guesses at its beginning that this pass did not change.
        """
        options, n = self.options, self.options.block_size
        if options.sliding_window:
            return torch.full_like(matched, n)
        newest = self.width - n  # the column at which the newest block begins
        columns = torch.arange(1, ids.shape[1], device=self.device)
        same = (ids[:, 1:] == greedy[:, :-1]) | (columns < newest[:, None])
        unchanged = 1 + leading(same & (columns < self.width[:, None]))
        accepted = torch.maximum(unchanged, matched + 2) - newest
        active = (self.start + self.width) // n - (self.start + matched + 1) // n
        grows = (active < options.blocks) & (accepted >= math.ceil(options.spawn_ratio * n))
        return self.width - matched - 1 + n * (grows | exits)

    def _buffers(self, greedy: Tensor, *, matched: Tensor, taken: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row, its next buffer and other guesses from the pool [b, 1 + pool, columns]; which are some [b, 1 + pool].

        The buffer: g_m, which is known, the guesses after it, and first guesses for the rest.
        """
        columns = torch.arange(self.options.columns, device=self.device)
        rows, left = self.emitted.rows, self.width - matched
        # only a row that ends here can be beyond the table
        position = ((self.start + matched + 1)[:, None] + columns).clamp(max=self.uniform.shape[1] - 1)
        unknown = Unknown(
            prompts=self.prompts[rows],
            lengths=self.prompt_lengths[rows],
            position=position,
            last=greedy.gather(1, taken[:, None]),
            uniform=self.uniform[rows[:, None], position],
        )
        guesses = _from(greedy, matched, n=len(columns))
        buffer = torch.where(columns < left[:, None], guesses, first_guess(self.options.init, unknown))
        others, some = self.pool.alternatives(buffer, width=width)
        self.pool.add(guesses, lengths=left)
        return torch.cat([buffer[:, None], others], dim=1), torch.cat([some.new_ones(len(some), 1), some], dim=1)


def _from(tokens: Tensor, first: Tensor, *, n: int) -> Tensor:
    """``n`` columns of ``tokens`` [b, W] from ``first`` [b] on, the last one again beyond them."""
    columns = first[:, None] + torch.arange(n, device=tokens.device)
    return tokens.gather(1, columns.clamp(max=tokens.shape[1] - 1))

"""Jacobi decoding: a causal language model guesses a block of tokens and reads it again until its guesses stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kdlib.decoding.cache import check_cache
from kdlib.decoding.jacobi_init import Init
from kdlib.decoding.jacobi_loop import Jacobi
from kdlib.decoding.jacobi_options import JacobiOptions
from kdlib.decoding.prompts import left_padding, pad_id, row_seeds, stops_of


@dataclass(frozen=True, kw_only=True)
class JacobiOutput:
    """Tokens, and how many passes they took; with n = block_size, block i of a row is its new tokens i n .. i n + n - 1.

    ``sequences`` [B, S + max_new_tokens]: prompt, new tokens, then padding; ``lengths`` [B]: new tokens, the stop token
    included. The first new token comes from the prompt's pass, which counts nowhere. ``forwards``: passes over the batch;
    ``passes`` [B]: those that a row took part in; ``iterations`` [B, ceil(max_new_tokens / n)]: those at whose start a block
    held the row's first token that was not settled (its keys in the cache, or taken as it was): 1 .. n for a complete block
    when blocks come one after another, 0 for one not reached; they sum to ``passes``. ``lossless``: whether tokens are those of
    plain greedy decoding by construction (no ``max_iterations``). ``trajectories``: of each row, of each block, its states
    [K, v], the first guess first and the last one as in ``sequences``, no repeats; v is n, or what the row has of its last
    block.
    """

    sequences: Tensor
    lengths: Tensor
    forwards: int
    passes: Tensor
    iterations: Tensor
    lossless: bool
    trajectories: list[list[Tensor]] | None = None

    @property
    def tokens_per_forward(self) -> float:
        """New tokens but the first per pass, over all rows: 1 for plain greedy decoding; NaN without a pass."""
        passes = int(self.passes.sum())
        return int((self.lengths - 1).sum()) / passes if passes else float("nan")


@torch.no_grad()
def jacobi_generate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    max_new_tokens: int,
    block_size: int,
    init: Init = "prompt",
    max_iterations: int | None = None,
    stop_at_eos: bool = True,
    generator: torch.Generator | None = None,
    seeds: Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    pad_token_id: int | None = None,
    sliding_window: bool = False,
    blocks: int = 1,
    spawn_ratio: float = 0.85,
    pool: int = 0,
    return_trajectories: bool = False,
) -> JacobiOutput:
    """Continues ``input_ids`` [B, S] (left-padded) greedily, n tokens at once: y_i <- argmax p(. | x, y_<i) for i < n.

    Jacobi decoding (CLLM, arXiv 2403.00835). Tokens up to the first one that a pass changed, that one included, are the greedy
    ones, whatever the guesses were: they are kept, and the rest is read again, so a block takes 1 to n passes. Rows do not wait
    for each other. In float32 the tokens are those of greedy decoding; in 16 bits passes of different length round differently.

    ``model`` is in evaluation mode. ``init``: the first guesses (``first_guess``); "random" and functions get numbers of the
    row's own seed, from ``seeds`` or else drawn from ``generator``, so that a row does not depend on its batch. ``stop_ids``:
    None for the eos of the model's generation config; no token stops with ``stop_at_eos=False``. A row ends at the model's
    context.

    ``sliding_window``: n guesses at any time, filled up after every pass, instead of blocks. ``blocks`` > 1 (Jacobi Forcing,
    arXiv 2512.14681): the next block begins once ``spawn_ratio`` of the newest one is accepted, up to that many at once.
    ``pool`` > 0 (rejection recycling, the same paper): continuations of the known token in the row's last rejected guesses are
    read beside the buffer, as more rows of the pass. None of the three changes the tokens. ``max_iterations`` does: after so
    many passes a block is taken as it is (early exit, CEED-VLA, arXiv 2506.13725); the next one begins in the pass that puts
    its tokens into the cache.

    Raises ValueError for options out of range or that do not go together, an empty prompt, one that fills the model's context,
    a mask that is not left-padded, another number of seeds than of rows, and models whose state cannot go back.
    """
    options = JacobiOptions(
        block_size=block_size,
        max_new_tokens=max_new_tokens,
        init=init,
        max_iterations=max_iterations,
        sliding_window=sliding_window,
        blocks=blocks,
        spawn_ratio=spawn_ratio,
        pool=pool,
        return_trajectories=return_trajectories,
    )
    check_cache(model, role="model")
    padding = left_padding(model, input_ids, attention_mask=attention_mask)
    seeds = row_seeds(seeds, rows=len(input_ids), generator=generator)
    stops = stops_of(model, stop_ids) if stop_at_eos else ()
    loop = Jacobi(model, options=options, stop_ids=stops, seeds=seeds)
    ids = input_ids.to(loop.device)
    loop.run(ids, padding=padding)
    emitted = loop.emitted
    return JacobiOutput(
        sequences=emitted.sequences(ids, pad_token_id=pad_id(model, stops) if pad_token_id is None else pad_token_id),
        lengths=emitted.lengths,
        forwards=loop.forwards,
        passes=loop.passes,
        iterations=loop.iterations,
        lossless=max_iterations is None,
        trajectories=None if loop.trace is None else loop.trace.blocks(emitted.new, lengths=emitted.lengths, n=block_size),
    )

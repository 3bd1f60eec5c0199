"""Drafters: what proposes tokens to a target, and the drafter that is a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from kdlib.decoding.cache import CachedModel, check_cache
from kdlib.decoding.sampling import context_length
from kdlib.decoding.spec_vocabulary import SharedVocabulary

Features = Mapping[int, Tensor]
Choose = Callable[[Tensor], Tensor]


@runtime_checkable
class Drafter(Protocol):
    """Proposes gamma tokens for each row of a batch; it keeps the state of one batch, from ``start`` to the next ``start``.

    Per batch: ``start`` once, then rounds of ``propose`` and ``commit``. With a row's known tokens x_0 .. x_{n-1}, ``propose``
    says x_n .. x_{n+gamma-1}. The target's features f_t (hidden state of each of ``layers`` at x_t) are given for t up to n-2,
    as they come from the forward pass that chose x_{n-1}: ``start`` gives f_0 .. f_{n-2}, so that a feature-level head (EAGLE)
    can read the pairs (x_{t+1}, f_t) for t = 0 .. n-2, of which the last one predicts x_n; ``commit`` gives those of the tokens
    that the round has added. Such a head feeds its own output for f_{n-1}, ... inside ``propose`` and forgets these pairs in
    ``commit``. Rows are left-padded, and integers that say how far rows move lie on the CPU; all else is on the target's
    device. Logits are over the target's vocabulary, -inf where the drafter cannot go.
    """

    layers: tuple[int, ...]
    """Which of the target's ``output_hidden_states`` (0: embeddings, i: output of layer i) it reads; () for none."""
    context: float
    """The longest sequence it can read; towards it the loop uses fewer of its proposals, beyond it none."""

    def start(self, ids: Tensor, *, padding: Tensor, features: Features) -> None:
        """New batch: ``ids`` [b, S + 1] are the prompts and the first new token, ``padding`` [b] (CPU) unused columns on the
        left of each row, ``features`` {layer: [b, S, D]} those of all columns but the last.
        """
        ...

    def propose(self, gamma: int, choose: Choose) -> None:
        """Calls ``choose`` gamma times with the logits [b, V] of the next token; it returns the token [b] that is proposed."""
        ...

    def commit(self, tokens: Tensor, *, accepted: Tensor, rows: Tensor, features: Features) -> None:
        """Takes over a round: ``rows`` [b'] (CPU, ascending indices into the batch) go on, and all else is of these rows only.

        ``tokens`` [b', gamma + 1]: the ``accepted`` [b'] (CPU) proposals, the target's own token after them, then columns
        without meaning. ``features`` {layer: [b', gamma + 1, D]} at the last known token and at the proposals: column i is the
        position before tokens[:, i], thus the pair (tokens[:, i], features[:, i]) is what a feature-level head reads, and
        columns beyond ``accepted`` are without meaning.
        """
        ...


class ModelDrafter:
    """A causal language model (evaluation mode) as a draft, with a key-value cache of its own.

    ``vocabulary``: which of its tokens are which of the target's; None when the ids are the same. The cache holds all known
    tokens but two, which each round reads again: a row that accepted everything lacks two, one that did not lacks one.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, model: nn.Module, *, vocabulary: SharedVocabulary | None = None) -> None:
        check_cache(model, role="draft")
        self.model: Any = model
        self.vocabulary, self.context = vocabulary, context_length(model)

    def start(self, ids: Tensor, *, padding: Tensor, features: Features) -> None:
        ids = self._ours(ids)
        self._cached, self._last = CachedModel(self.model, padding=padding), ids[:, -2:]
        if ids.shape[1] > 2:
            self._cached.read(ids[:, :-2], logits_to_keep=1)

    def propose(self, gamma: int, choose: Choose) -> None:
        read = self._last
        for _ in range(gamma):
            logits = self._cached.read(read, logits_to_keep=1)[0][:, -1]
            chosen = choose(logits if self.vocabulary is None else self.vocabulary.to_target(logits))
            read = self._ours(chosen[:, None])

    def commit(self, tokens: Tensor, *, accepted: Tensor, rows: Tensor, features: Features) -> None:
        gamma = tokens.shape[1] - 1
        self._cached.go_back(rows, tokens=gamma - accepted)
        known = torch.cat([self._last[rows.to(tokens.device), 1:], self._ours(tokens)], dim=1)
        last = torch.stack([accepted, accepted + 1], dim=1).to(tokens.device, non_blocking=True)
        self._last = known.gather(1, last)

    def _ours(self, ids: Tensor) -> Tensor:
        return ids if self.vocabulary is None else self.vocabulary.to_draft(ids)

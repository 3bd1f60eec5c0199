"""An EAGLE-3 head as a drafter: a chain of tokens from the target's hidden states, as vLLM's method eagle3 drafts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdlib.decoding.cache import CachedModel
from kdlib.decoding.drafters import Choose, Features
from kdlib.drafts.eagle3 import Eagle3Draft


class EagleDrafter:
    """Drafts with ``draft`` (evaluation mode) for the target it was trained on.

    Logits are over the target's vocabulary, -inf outside of the draft's. Pairs (x_{t+1}, f_t) are read at position t; within a
    round the head reads what it has fed back, at the positions after, and these are forgotten when the round is over.
    ``context`` has no end of its own: positions go on as far as the target's, as in vLLM.
    """

    context = math.inf

    def __init__(self, draft: Eagle3Draft) -> None:
        if draft.config.feature_layers is None:
            raise ValueError("the head does not say which layers its features come from: load it with its target")
        self.draft = draft
        self.layers = tuple(draft.config.feature_layers)
        self._ids = draft.vocabulary.ids

    def start(self, ids: Tensor, *, padding: Tensor, features: Features) -> None:
        self._cached, self._ahead = _CachedHead(self.draft, padding=padding), 0
        last, fed = self._cached.step(self._fused(features), ids[:, 1:])
        self._last, self._fed = last[:, -1:], fed[:, -1:]

    def propose(self, gamma: int, choose: Choose) -> None:
        last, fed = self._last, self._fed
        self._ahead = gamma - 1
        for i in range(gamma):
            chosen = choose(self.target_logits(last[:, -1]))
            if i < self._ahead:
                last, fed = self._cached.step(fed, chosen[:, None])

    def commit(self, tokens: Tensor, *, accepted: Tensor, rows: Tensor, features: Features) -> None:
        self._cached.go_back(rows, tokens=torch.full_like(rows, self._ahead))
        last, fed = self._cached.step(self._fused(features), tokens)
        at = accepted.to(tokens.device, non_blocking=True)[:, None, None]
        self._last, self._fed = (x.gather(1, at.expand(-1, 1, x.shape[2])) for x in (last, fed))
        self._cached.go_back(torch.arange(len(rows)), tokens=tokens.shape[1] - 1 - accepted)

    def _fused(self, features: Features) -> Tensor:
        return self.draft.fuse(torch.cat([features[layer] for layer in self.layers], -1))

    def target_logits(self, last: Tensor) -> Tensor:
        """[n, D] -> [n, V] over the target's vocabulary, -inf outside of the draft's."""
        drafted = self.draft.lm_head(last).float()
        whole = drafted.new_full((len(drafted), self.draft.config.vocab_size), -torch.inf)
        return whole.index_copy(1, self._ids, drafted)


class _CachedHead(CachedModel):
    """The cache of pairs that a head has read; rows go back as those of a model do."""

    model: Eagle3Draft

    def step(self, hidden: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Reads n more pairs: (for the head, to feed back), both [b, n, D]."""
        room = self.extend(ids.shape[1])
        assert room["position_ids"] is not None
        return self.model.step(
            hidden, ids, position_ids=room["position_ids"], attention_mask=room["attention_mask"], cache=self._cache
        )

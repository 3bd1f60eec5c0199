"""Terms of a loss weighted so that each pulls the student's hidden states as much as its weight says."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

TINY = 1e-8  # of a term whose gradient vanishes


class GradientBalance:
    """w_k = c_k / g_k times sum(c) / sum(c / g), g_k = |d mean_k / d H| over all scored hidden states H of the step before.

    c_k are the terms' own weights, which hold in the first step; the sum of all w_k is theirs. g_k^2 is a sum over rows, so
    that it does not depend on how a step is split. (tokenkit's approx_gradmag_preserve_mag takes the gradients of the last
    layer's weights and leaves c_k out.)
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = dict(weights)
        self._squares: dict[str, Tensor] = {}

    def watched(self, hidden: Tensor, term: str) -> Tensor:
        """``hidden`` for one term; what flows back through it is measured."""
        if not hidden.requires_grad:
            return hidden
        alias = hidden.view_as(hidden)

        def note(gradient: Tensor) -> None:
            square = gradient.detach().float().square().sum()
            self._squares[term] = self._squares.get(term, torch.zeros_like(square)) + square

        alias.register_hook(note)
        return alias

    def init_state(self) -> dict[str, float]:
        """The weights of the first step, under the keys of an objective's state."""
        return {f"weight.{name}": weight for name, weight in self.weights.items()}

    def taken(self, device: torch.device) -> Tensor:
        """|d (w_k mean_k) / d H|^2 of this process since the last call, [terms] in the order of the weights."""
        zero = torch.zeros((), device=device)
        squares, self._squares = self._squares, {}
        return torch.stack([squares.get(name, zero).to(device) for name in self.weights])

    def update(self, state: Mapping[str, float], squares: Tensor) -> dict[str, float]:
        """The state of the next step from ``squares`` of all processes, taken under ``state``.

        It stays as it is where a term had no gradient, or one that overflowed.
        """
        norms = {
            name: max(square**0.5 / state[f"weight.{name}"], TINY)
            for name, square in zip(self.weights, squares.tolist(), strict=True)
            if 0 < square < math.inf
        }
        if len(norms) < len(self.weights):
            return dict(state)
        pulls = {name: self.weights[name] / norm for name, norm in norms.items()}
        scale = sum(self.weights.values()) / sum(pulls.values())
        return {f"weight.{name}": scale * pull for name, pull in pulls.items()}

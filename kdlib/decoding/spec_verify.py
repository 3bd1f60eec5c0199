"""Verification: which proposals of a round stand, and the token of the target's that follows them."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlib.decoding.emitted import leading
from kdlib.decoding.sampling import draw, filtered_log_probs
from kdlib.types import SamplingParams


class Round:
    """The random choices of one round: the drafter calls it to choose, ``verify`` decides about what it chose.

    ``uniform`` [b, 2 gamma + 1] in [0, 1): gamma draws of the draft, gamma decisions, one draw of the target. ``one_hot``: the
    draft proposes its argmax though the target samples. ``lenience`` l >= 1 accepts with min(1, l p/q) and rejects into
    norm(max(l p - q, 0)), so that no token gets more than l p (Leviathan et al. 2023, appendix A.5, with l their 1/l); when the
    target is greedy, a proposal stands if l p(x) reaches max p. Exact for l = 1, and only then.
    """

    def __init__(self, params: SamplingParams, *, uniform: Tensor, one_hot: bool, lenience: float) -> None:
        self.params, self.uniform, self.one_hot, self.lenience = params, uniform, one_hot, lenience
        self._ids: list[Tensor] = []
        self._logq: list[Tensor] = []

    def choose(self, logits: Tensor) -> Tensor:
        """The draft's next token [b] from its logits [b, V] over the target's vocabulary."""
        if self.params.temperature == 0 or self.one_hot:
            chosen = logits.argmax(-1)
        else:
            self._logq.append(filtered_log_probs(logits, self.params))
            chosen = draw(self._logq[-1], self.uniform[:, len(self._ids)])
        self._ids.append(chosen)
        return chosen

    def proposals(self) -> Tensor:
        """[b, gamma]"""
        return torch.stack(self._ids, dim=1)

    def verify(self, logits: Tensor, *, room: Tensor) -> tuple[Tensor, Tensor]:
        """Number of accepted proposals [b] and the target's token after them [b], from the target's logits [b, gamma + 1, V].

        ``room`` [b]: how many proposals may stand at most; after that many the token is drawn from p, as after gamma.
        """
        ids = self.proposals()
        allowed = torch.arange(ids.shape[1], device=ids.device) < room[:, None]
        if self.params.temperature == 0:
            return self._greedy(logits, ids=ids, allowed=allowed)
        p = filtered_log_probs(logits, self.params).exp()
        q = torch.zeros_like(p[:, :-1]).scatter(-1, ids[..., None], 1.0) if not self._logq else torch.stack(self._logq, 1).exp()
        stands = self._stands(p[:, :-1], q, ids=ids) & allowed
        accepted = leading(stands)
        q = torch.nn.functional.pad(q * allowed[..., None], (0, 0, 0, 1))  # q = 0: what follows is drawn from p itself
        at = accepted[:, None, None].expand(-1, 1, p.shape[-1])
        residual = self._residual(p.gather(1, at)[:, 0], q.gather(1, at)[:, 0])
        return accepted, draw(residual.log(), self.uniform[:, -1])

    def _greedy(self, logits: Tensor, *, ids: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
        best = logits.argmax(-1)
        stands = ids == best[:, :-1]
        if self.lenience > 1:
            drafted, highest = logits[:, :-1].gather(-1, ids[..., None])[..., 0], logits[:, :-1].amax(-1)
            stands |= (drafted.double() - highest.double()).exp() * self.lenience >= 1
        accepted = leading(stands & allowed)
        return accepted, best.gather(1, accepted[:, None])[:, 0]

    def _stands(self, p: Tensor, q: Tensor, *, ids: Tensor) -> Tensor:
        """u < l p(x) / q(x) [b, gamma]."""
        px, qx = (side.gather(-1, ids[..., None])[..., 0].double() for side in (p, q))
        gamma = ids.shape[1]
        return self.uniform[:, gamma : 2 * gamma] * qx < self.lenience * px

    def _residual(self, p: Tensor, q: Tensor) -> Tensor:
        """max(l p - q, 0) [b, V], not normalised; p where rounding has left nothing of it, or where q is 0."""
        residual = (self.lenience * p - q).clamp(min=0)
        return torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)

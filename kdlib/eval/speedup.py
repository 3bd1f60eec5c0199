"""The wall-time model of speculative decoding: what acceptance and measured costs make of a draft.

Per verify round the draft runs gamma one-token steps, the target verifies gamma + 1 tokens, and ``acceptance_length``
tokens come out (the bonus token included). Costs are in units of the target's one-token step: c is the draft's step,
v the verification (1 in Leviathan et al. 2023, more where the hardware has no arithmetic to spare). A draft that
proposes all gamma tokens in one pass of cost b is the same model with c = b / gamma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from operator import mul

from scipy.optimize import brentq

Verify = Callable[[int], float] | Mapping[int, float]


def speedup(acceptance_length: float, *, gamma: int, c: float, v: float) -> float:
    """Tokens per second with the draft over those without: tau / (gamma c + v) (Leviathan et al. 2023, with v measured)."""
    return acceptance_length / (gamma * c + v)


def iid_acceptance_length(alpha: float, *, gamma: int) -> float:
    """Tokens per round when each drafted token is accepted with probability alpha: (1 - alpha^(gamma+1)) / (1 - alpha)."""
    return sum(alpha**k for k in range(gamma + 1))  # the same polynomial, also right at alpha = 1


def acceptance_length_of(conditional_rates: Sequence[float]) -> float:
    """Tokens per round, 1 + sum_k prod_{i<=k} alpha_i, where alpha_i is position i's rate once those before it are accepted."""
    return 1.0 + sum(accumulate(conditional_rates, mul))


def best_gamma(alpha: float, *, c: float, v: Verify, gammas: Iterable[int]) -> tuple[int, float]:
    """(gamma, speed-up) of the fastest gamma of ``gammas`` at i.i.d. acceptance alpha; the smallest one of equals."""
    found = [(gamma, speedup(iid_acceptance_length(alpha, gamma=gamma), gamma=gamma, c=c, v=_at(v, gamma))) for gamma in gammas]
    return max(found, key=lambda pair: (pair[1], -pair[0]))


def break_even_acceptance(*, c: float, v: float, gamma: int) -> float | None:
    """The least i.i.d. alpha whose speed-up is 1; None when even alpha = 1 is slower than the target alone."""
    cost = gamma * c + v
    if cost <= 1.0:
        return 0.0
    if cost > gamma + 1:
        return None
    return float(brentq(lambda alpha: iid_acceptance_length(alpha, gamma=gamma) - cost, 0.0, 1.0, xtol=1e-12))


def _at(v: Verify, gamma: int) -> float:
    return v[gamma] if isinstance(v, Mapping) else v(gamma)

"""Every objective once more, in plain Python floats over the probabilities of one row, by other means.

Double precision holds probabilities down to 1e-308, so sums over p and q need no log-space care here, even
for gaps of 200 nats. Gradients are analytic where the formula is short, and central differences elsewhere;
what an objective holds fixed (stop-gradient) is frozen in both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Row = Sequence[float]
STEP = 1e-5


# Values -------------------------------------------------------------------------------------------


def value(objective: Any, s: Row, z: Row | None, *, label: int = 0, frozen: Row | None = None) -> float:
    """The loss of one row from raw logits; ``frozen``: the student's where gradients stop."""
    frozen = s if frozen is None else frozen
    name = type(objective).__name__
    if name == "Sum":
        return math.fsum(w * value(o, s, z, label=label, frozen=frozen) for w, o in objective.parts)
    if name == "CrossEntropy":
        return -_log(softmax(s)[label])
    assert z is not None
    T = objective.temperature
    factor = T * T if objective.t_squared else 1.0
    if name == "PlackettLuce":
        return factor * _plackett_luce(objective, softmax(s, T), softmax(z, T * objective.tau), label)
    q, p, fixed = softmax(s, T), softmax(z, T), softmax(frozen, T)
    if name == "SampledReverseKL":
        return _sampled(objective, p[label], q[label])
    return factor * divergence(objective, p, q, fixed=fixed)


def divergence(objective: Any, p: Row, q: Row, *, fixed: Row | None = None) -> float:
    """D(p, q) over the outcomes given, without temperature."""
    return _DIVERGENCES[type(objective).__name__](objective, p, q, q if fixed is None else fixed)


def softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    top = max(logits)
    weights = [math.exp((x - top) / temperature) for x in logits]
    total = math.fsum(weights)
    return [w / total for w in weights]


def coarse(p: Row, ids: Sequence[int]) -> list[float]:
    """The probabilities of ``ids`` and, last, the sum of all others."""
    return [p[i] for i in ids] + [math.fsum(x for i, x in enumerate(p) if i not in ids)]


def best(p: Row, k: int) -> list[int]:
    return sorted(range(len(p)), key=lambda i: -p[i])[:k]


def kl(p: Row, q: Row) -> float:
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        return math.inf
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def mix(p: Row, q: Row, weight: float) -> list[float]:
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def entropy(p: Row) -> float:
    return -math.fsum(a * math.log(a) for a in p if a > 0)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _jsd(o: Any, p: Row, q: Row, _: Row) -> float:
    if o.beta in (0.0, 1.0):
        return kl(p, q) if o.beta == 0.0 else kl(q, p)
    m = mix(p, q, o.beta)
    return o.beta * kl(p, m) + (1 - o.beta) * kl(q, m)


def _alpha_beta(o: Any, p: Row, q: Row, _: Row) -> float:
    a, b = o.alpha, o.beta
    pairs = [(x, y) for x, y in zip(p, q, strict=True) if x > 0 or y > 0]
    if a == 0 and b == 0:
        return math.fsum(0.5 * math.log(x / y) ** 2 if x and y else math.inf for x, y in pairs)
    if a + b == 0:
        return math.fsum(math.log(y**a / x**a) + (x / y) ** a - 1 if x and y else math.inf for x, y in pairs) / (a * a)
    if a == 0:
        return _alpha_one_sided([(y, x) for x, y in pairs], b)
    if b == 0:
        return _alpha_one_sided(pairs, a)
    if any((x == 0 and a < 0) or (y == 0 and b < 0) for x, y in pairs):
        return math.inf
    c = a + b
    return math.fsum(x**a * y**b - a / c * x**c - b / c * y**c for x, y in pairs) / (-a * b)


def _alpha_one_sided(pairs: list[tuple[float, float]], a: float) -> float:
    if any(x > 0 and y == 0 for x, y in pairs):
        return math.inf
    return math.fsum((x**a * math.log((x / y) ** a) if x > 0 else 0.0) - x**a + y**a for x, y in pairs) / a**2


def _adaptive(o: Any, p: Row, q: Row, fixed: Row) -> float:
    gaps = [abs(a - b) for a, b in zip(p, fixed, strict=True)]
    head, mass = set(), 0.0
    for i in best(p, len(p)):
        if mass >= o.mu:
            break
        head.add(i)
        mass += p[i]
    total = math.fsum(gaps)
    share = math.fsum(gaps[i] for i in head) / total if total else 0.5
    return share * kl(p, q) + (1 - share) * kl(q, p)


def _balanced(o: Any, p: Row, q: Row, fixed: Row) -> float:
    gap = entropy(p) - entropy(fixed)
    return (o.strong if gap > 0 else 1.0) * kl(p, q) + (o.strong if gap < 0 else 1.0) * kl(q, p)


def _interpolated(t: float, p: Row, q: Row, fixed: Row) -> float:
    raw = [a**t * b ** (1 - t) for a, b in zip(p, fixed, strict=True)]
    total = math.fsum(raw)
    return kl([x / total for x in raw], q)


def _decoupled(o: Any, p: Row, q: Row, _: Row) -> float:
    ids = best(p, o.k)
    P, Q = math.fsum(p[i] for i in ids), math.fsum(q[i] for i in ids)
    binary = kl([P, max(1 - P, 0.0)], [Q, max(1 - Q, 0.0)])
    inside = [[x[i] ** (1 / o.tau) for i in ids] for x in (p, q)]
    conditional = [[x / math.fsum(side) for x in side] for side in inside]
    return binary + P * kl(*conditional)


def _plackett_luce(o: Any, q: Row, a: Row, label: int) -> float:
    order = best(a, len(a))
    if o.label_first:
        order = [label, *(i for i in order if i != label)]
    total = 0.0
    for k, i in enumerate(order[: o.top_k]):
        total += a[i] * (math.log(math.fsum(q[j] for j in order[k:])) - _log(q[i])) if a[i] > 0 else 0.0
    return total


def _sampled(o: Any, p: float, q: float) -> float:
    if q == 0:
        return 0.0  # the student cannot have drawn it
    if p == 0:
        return math.inf
    return math.log(q / p) if o.estimator == "k1" else p / q - 1 - math.log(p / q)


def acceptance(p: Row, q: Row) -> float:
    """The rate at which a token drafted from q is accepted by p."""
    return math.fsum(min(a, b) for a, b in zip(p, q, strict=True))


def _lk_hybrid(o: Any, p: Row, q: Row, fixed: Row) -> float:
    share = math.exp(-o.eta * acceptance(p, fixed))
    return share * kl(p, q) + (1 - share) * (1 - acceptance(p, q))


_DIVERGENCES: dict[str, Callable[[Any, Row, Row, Row], float]] = {
    "ForwardKL": lambda o, p, q, _: kl(p, q),
    "ReverseKL": lambda o, p, q, _: kl(q, p),
    "GeneralizedJSD": _jsd,
    "SkewKL": lambda o, p, q, _: kl(p, mix(p, q, o.alpha)),
    "SkewReverseKL": lambda o, p, q, _: kl(q, mix(q, p, o.alpha)),
    "AlphaBeta": _alpha_beta,
    "AdaptiveKL": _adaptive,
    "BalancedKL": _balanced,
    "TotalVariation": lambda o, p, q, _: 0.5 * math.fsum(abs(a - b) for a, b in zip(p, q, strict=True)),
    "Interpolated": lambda o, p, q, fixed: _interpolated(o.t, p, q, fixed),
    "TAID": lambda o, p, q, fixed: _interpolated(o.t_start, p, q, fixed),
    "DecoupledTopK": _decoupled,
    "NegLogAcceptance": lambda o, p, q, _: -_log(acceptance(p, q)),
    "LKHybrid": _lk_hybrid,
    "SelectiveKL": lambda o, p, q, _: kl(p, q),
}


# Gradients ----------------------------------------------------------------------------------------


def gradient(objective: Any, s: Row, z: Row | None, *, label: int = 0) -> list[float]:
    """d value / d student logits, analytic where ``_ANALYTIC`` has it."""
    if type(objective).__name__ not in _ANALYTIC:
        return numeric_gradient(objective, s, z, label=label)
    if z is None:
        q = softmax(s)
        return [b - (v == label) for v, b in enumerate(q)]
    T = objective.temperature
    p, q = softmax(z, T), softmax(s, T)
    if type(objective).__name__ == "SampledReverseKL":
        gap = math.log(q[label] / p[label]) if q[label] > 0 and p[label] > 0 else 0.0
        return [gap * ((v == label) - b) for v, b in enumerate(q)]
    scale = (T * T if objective.t_squared else 1.0) / T
    return [scale * g for g in _ANALYTIC[type(objective).__name__](objective, p, q)]


def numeric_gradient(objective: Any, s: Row, z: Row | None, *, label: int = 0) -> list[float]:
    """Central differences in double precision; entries of -inf get 0."""

    def moved(v: int, step: float) -> float:
        there = [x + step if i == v else x for i, x in enumerate(s)]
        return value(objective, there, z, label=label, frozen=s)

    return [(moved(v, STEP) - moved(v, -STEP)) / (2 * STEP) if s[v] > -math.inf else 0.0 for v in range(len(s))]


def _through_softmax(q: Row, slope: Row) -> list[float]:
    """From dL/dq to dL/dlogits: q_v (slope_v - E_q slope)."""
    mean = math.fsum(b * g for b, g in zip(q, slope, strict=True) if b > 0)
    return [b * (g - mean) if b > 0 else 0.0 for b, g in zip(q, slope, strict=True)]


def _log_ratios(q: Row, m: Row) -> list[float]:
    return [math.log(b / c) if b > 0 else 0.0 for b, c in zip(q, m, strict=True)]


def _gradient_jsd(o: Any, p: Row, q: Row) -> list[float]:
    if o.beta == 0.0:
        return [b - a for a, b in zip(p, q, strict=True)]
    m = p if o.beta == 1.0 else mix(p, q, o.beta)
    weight = 1.0 if o.beta == 1.0 else 1 - o.beta
    return [weight * g for g in _through_softmax(q, _log_ratios(q, m))]


def _gradient_skew(o: Any, p: Row, q: Row) -> list[float]:
    m = mix(p, q, o.alpha)
    return _through_softmax(q, [-(1 - o.alpha) * a / c if c > 0 else 0.0 for a, c in zip(p, m, strict=True)])


def _gradient_skew_reverse(o: Any, p: Row, q: Row) -> list[float]:
    m = mix(q, p, o.alpha)
    logs = _log_ratios(q, m)
    slope = [g - o.alpha * b / c if c > 0 else 0.0 for g, b, c in zip(logs, q, m, strict=True)]
    return _through_softmax(q, slope)


def _gradient_acceptance(p: Row, q: Row) -> list[float]:
    return _through_softmax(q, [1.0 if b < a else 0.0 for a, b in zip(p, q, strict=True)])


def _gradient_nla(o: Any, p: Row, q: Row) -> list[float]:
    alpha = acceptance(p, q)
    if alpha == 0.0:
        return [b - a for a, b in zip(p, q, strict=True)]
    return [-g / alpha for g in _gradient_acceptance(p, q)]


def _gradient_lk_hybrid(o: Any, p: Row, q: Row) -> list[float]:
    share = math.exp(-o.eta * acceptance(p, q))
    return [share * (b - a) - (1 - share) * g for a, b, g in zip(p, q, _gradient_acceptance(p, q), strict=True)]


_ANALYTIC: dict[str, Callable[[Any, Row, Row], list[float]]] = {
    "ForwardKL": lambda o, p, q: [b - a for a, b in zip(p, q, strict=True)],
    "ReverseKL": lambda o, p, q: _through_softmax(q, _log_ratios(q, p)),
    "GeneralizedJSD": _gradient_jsd,
    "SkewKL": _gradient_skew,
    "SkewReverseKL": _gradient_skew_reverse,
    "TotalVariation": lambda o, p, q: _through_softmax(
        q, [0.5 * math.copysign(1.0, b - a) if a != b else 0.0 for a, b in zip(p, q, strict=True)]
    ),
    "NegLogAcceptance": _gradient_nla,
    "LKHybrid": _gradient_lk_hybrid,
    "SelectiveKL": lambda o, p, q: [b - a for a, b in zip(p, q, strict=True)],
    "CrossEntropy": lambda o, p, q: [],  # handled where no teacher is asked for
    "SampledReverseKL": lambda o, p, q: [],  # handled where the label is known
}


# Tensors ------------------------------------------------------------------------------------------


def batch(objective: Any, s: Tensor, z: Tensor | None, *, labels: Tensor | None = None) -> tuple[float, Tensor]:
    """(sum of the rows, gradient [n, V] in float64) for logits [n, V] as rounded to their type."""
    students = s.detach().double().tolist()
    teachers = [None] * len(students) if z is None else z.double().tolist()
    ids = [0] * len(students) if labels is None else labels.tolist()
    rows = list(zip(students, teachers, ids, strict=True))
    total = math.fsum(value(objective, a, b, label=y) for a, b, y in rows)
    if type(objective).__name__ == "CrossEntropy":
        rows = [(a, None, y) for a, _, y in rows]
    return total, torch.tensor([gradient(objective, a, b, label=y) for a, b, y in rows], dtype=torch.float64)

"""Entropic optimal transport between two weighted sets of points, in the log domain, from the costs between them.

Costs are [..., n, m], log-masses log a [..., n] and log b [..., m] (-inf: no mass), each side of mass one. The plan is
P_ij = a_i b_j exp((f_i + g_j - C_ij) / epsilon) with potentials f [..., n] and g [..., m].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Loss = Literal["transport", "dual"]


@dataclass(frozen=True, kw_only=True)
class Transported:
    """``value`` [...] of the loss, and ``marginal_error`` [...] = sum_i |sum_j P_ij - a_i| + sum_j |sum_i P_ij - b_j|, without
    gradient: how far the iterations are from having converged.
    """

    value: Tensor
    marginal_error: Tensor


def sinkhorn(
    cost: Tensor, log_a: Tensor, log_b: Tensor, *, epsilon: float, iterations: int, loss: Loss, symmetric: bool = False
) -> Transported:
    """min_P <P, C> + epsilon KL(P | a b') over plans P with marginals a and b, after ``iterations`` of Sinkhorn.

    loss "transport": sum_ij P_ij C_ij, the cost of the plan, whose gradient goes through all iterations (each recomputed in
    backward, so that no more than n + m potentials of it are kept). loss "dual": <a, f> + <b, g> - epsilon (sum P - 1), the
    regularised value itself, whose gradient is taken at fixed potentials (envelope theorem: exact at convergence). An iteration
    updates rows, then columns, so that the columns' marginals are met; ``symmetric`` moves both sides half the way at once.
    """
    if loss == "dual":
        with torch.no_grad():
            f, g = potentials(cost, log_a, log_b, epsilon=epsilon, iterations=iterations, symmetric=symmetric)
    else:
        f, g = potentials(cost, log_a, log_b, epsilon=epsilon, iterations=iterations, symmetric=symmetric)
    plan = transport_plan(cost, log_a, log_b, f=f, g=g, epsilon=epsilon)
    if loss == "dual":
        excess = plan.sum((-2, -1)) - 1.0
        value = (log_a.exp() * f).sum(-1) + (log_b.exp() * g).sum(-1) - epsilon * excess
    else:
        value = (plan * cost).sum((-2, -1))
    return Transported(value=value, marginal_error=_marginal_error(plan.detach(), log_a.detach(), log_b.detach()))


def potentials(
    cost: Tensor, log_a: Tensor, log_b: Tensor, *, epsilon: float, iterations: int, symmetric: bool = False
) -> tuple[Tensor, Tensor]:
    """f [..., n] and g [..., m] after ``iterations``, from zero."""
    f, g = torch.zeros_like(cost[..., 0]), torch.zeros_like(cost[..., 0, :])
    for _ in range(iterations):
        if torch.is_grad_enabled() and any(x.requires_grad for x in (cost, log_a, log_b)):
            f, g = checkpoint(
                _iteration, cost, log_a, log_b, f, g, epsilon, symmetric, use_reentrant=False, preserve_rng_state=False
            )
        else:
            f, g = _iteration(cost, log_a, log_b, f, g, epsilon, symmetric)
    return f, g


def _iteration(
    cost: Tensor, log_a: Tensor, log_b: Tensor, f: Tensor, g: Tensor, epsilon: float, symmetric: bool
) -> tuple[Tensor, Tensor]:
    over_columns = _softmin(cost, g, log_b, epsilon)
    if symmetric:
        return 0.5 * (f + over_columns), 0.5 * (g + _softmin(cost.mT, f, log_a, epsilon))
    return over_columns, _softmin(cost.mT, over_columns, log_a, epsilon)


def _softmin(cost: Tensor, potential: Tensor, log_mass: Tensor, epsilon: float) -> Tensor:
    """-epsilon log sum_j exp(log_mass_j + (potential_j - C_ij) / epsilon) [..., n]."""
    return -epsilon * torch.sub((log_mass + potential / epsilon)[..., None, :], cost, alpha=1.0 / epsilon).logsumexp(-1)


def transport_plan(cost: Tensor, log_a: Tensor, log_b: Tensor, *, f: Tensor, g: Tensor, epsilon: float) -> Tensor:
    """P [..., n, m]."""
    rows, columns = log_a + f / epsilon, log_b + g / epsilon
    return torch.sub(rows[..., :, None] + columns[..., None, :], cost, alpha=1.0 / epsilon).exp()


def _marginal_error(plan: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    return (plan.sum(-1) - log_a.exp()).abs().sum(-1) + (plan.sum(-2) - log_b.exp()).abs().sum(-1)

"""What a distribution says about its column: confidence, entropy, margin."""

from __future__ import annotations

import torch
from torch import Tensor

from kdlib.decoding.diffusion_step import Step


def confidence(step: Step) -> Tensor:
    """[b, n] softmax(z)[token], the probability of each proposal at temperature 1."""
    return (step.logits.gather(-1, step.tokens[..., None])[..., 0] - step.logits.logsumexp(-1)).exp()


def entropy(step: Step) -> Tensor:
    """[b, n] -sum_v p_v log p_v in nats, p = softmax(z)."""
    return torch.special.entr(step.logits.softmax(-1)).sum(-1)


def margin(step: Step) -> Tensor:
    """[b, n] the largest probability minus the second largest one."""
    first, second = step.logits.softmax(-1).topk(2).values.unbind(-1)
    return first - second


def ranks(score: Tensor, *, masked: Tensor) -> Tensor:
    """[b, n] the place of each masked column among the row's, by falling score, from 0; ties go to the left."""
    order = score.masked_fill(~masked, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(-1)

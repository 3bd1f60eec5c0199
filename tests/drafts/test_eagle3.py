"""The head's unrolled training pass against real chain drafting with a cache, and the numbering of the target's layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.drafts.eagle3_config import Eagle3Config, check_feature_layers, default_feature_layers
from kdlib.drafts.vocabulary import draft_vocabulary
from kdlib.head import Head
from kdlib.models import hidden_states
from tests.tiny import tiny_llama

V, DV = 96, 40
LENGTHS = (11, 7, 4)


def target_and_head(**config: Any) -> tuple[Any, Eagle3Draft]:
    target = tiny_llama(V, layers=4).double()
    settings = Eagle3Config.of_target(target.config, draft_vocab_size=DV, **config)
    torch.manual_seed(7)
    counts = torch.randint(0, 9, (V,))
    head = Eagle3Draft.for_target(
        settings,
        embeddings=target.get_input_embeddings().weight,
        head=Head.of(target),
        vocabulary=draft_vocabulary(counts, DV, vocab_size=V),
    ).double()
    for name, weight in head.named_parameters():
        if "norm" in name:
            weight.data.uniform_(0.5, 1.5)  # so that norms in the wrong place are seen
    return target, head.eval()


def features_of(target: Any, ids: Tensor, head: Eagle3Draft) -> Tensor:
    layers = tuple(head.config.feature_layers)
    with torch.no_grad():
        _, found = hidden_states(target, {"input_ids": ids}, layers=layers)
    return torch.cat([found[layer] for layer in layers], -1)


@torch.no_grad()
def chain(head: Eagle3Draft, features: Tensor, ids: Tensor, t: int, steps: int) -> list[Tensor]:
    """Hidden states of drafting from prefix ``t``, the true tokens forced, as a server does it: a cache, one token a step."""
    cache = DynamicCache()
    positions = torch.arange(t + 1)[None]
    last, fed = head.step(head.fuse(features[:, : t + 1]), ids[:, 1 : t + 2], position_ids=positions, cache=cache)
    found = [last[:, -1]]
    for j in range(1, steps):
        token = ids[:, t + 1 + j : t + 2 + j]
        last, fed = head.step(fed[:, -1:], token, position_ids=torch.tensor([[t + j]]), cache=cache)
        found.append(last[:, -1])
    return found


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"norm_before_residual": True},
        {"norm_output": True, "fc_norm": True},
        {"norm_before_fc": True, "num_key_value_heads": 4},
    ],
)
def test_unrolling_equals_chains_with_a_cache(config: dict[str, Any]) -> None:
    target, head = target_and_head(**config)
    torch.manual_seed(0)
    rows = [torch.randint(3, V, (1, length)) for length in LENGTHS]
    padded = torch.zeros(len(rows), max(LENGTHS), dtype=torch.long)
    for line, row in zip(padded, rows, strict=True):
        line[: row.shape[1]] = row
    found = head.unroll(features_of(target, padded, head), padded, steps=4)
    compared = 0
    for line, row in enumerate(rows):
        features = features_of(target, row, head)
        for t in range(row.shape[1] - 1):
            steps = min(4, row.shape[1] - 1 - t)
            for j, expected in enumerate(chain(head, features, row, t, steps)):
                torch.testing.assert_close(found[j][line, t], expected[0], rtol=1e-5, atol=1e-6)
                logits = head.lm_head(found[j][line, t])
                torch.testing.assert_close(logits, head.lm_head(expected[0]), rtol=1e-5, atol=1e-6)
                compared += 1
    assert compared == sum(min(4, length - 1 - t) for length in LENGTHS for t in range(length - 1))


def test_a_left_padded_step_is_that_of_the_row_alone() -> None:
    target, head = target_and_head()
    row, pad = torch.randint(3, V, (1, 6)), 3
    features = features_of(target, row, head)
    alone, _ = head.step(head.fuse(features), row, position_ids=torch.arange(6)[None])
    padded = torch.nn.functional.pad(features, (0, 0, pad, 0), value=5.0)
    ids = torch.nn.functional.pad(row, (pad, 0))
    positions = (torch.arange(6 + pad) - pad).clamp(min=0)[None]
    mask = (torch.arange(6 + pad) >= pad).long()[None]
    beside, _ = head.step(head.fuse(padded), ids, position_ids=positions, attention_mask=mask, cache=DynamicCache())
    torch.testing.assert_close(beside[:, pad:], alone)


def test_gradient_checkpointing_and_float32_change_nothing() -> None:
    target, head = target_and_head()
    ids = torch.randint(3, V, (2, 9))
    features = features_of(target, ids, head)

    def gradients(model: Eagle3Draft) -> dict[str, Tensor]:
        model.train().zero_grad()
        sum(h[:, :5].square().mean() for h in model.unroll(features, ids, steps=3)).backward()  # type: ignore[union-attr]
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(head)
    head.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed = gradients(head)
    single = gradients(head.float())
    assert plain.keys() == {name for name, _ in head.named_parameters()} - {"embed_tokens.weight", "lm_head.weight"}
    for name, expected in plain.items():
        torch.testing.assert_close(checkpointed[name], expected)
        torch.testing.assert_close(single[name].double(), expected, rtol=2e-4, atol=2e-5)


def test_feature_i_is_what_layer_i_reads() -> None:
    """EAGLE's numbering: the residual stream before layer i, seen by a hook on the target's layer."""
    target = tiny_llama(V, layers=5)
    seen: dict[int, Tensor] = {}
    for i, layer in enumerate(target.model.layers):
        layer.register_forward_pre_hook(
            lambda _, args, kwargs, i=i: seen.__setitem__(i, args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    layers = default_feature_layers(5)
    _, features = hidden_states(target, {"input_ids": torch.arange(3, 12)[None]}, layers=layers)
    for i in layers:
        torch.testing.assert_close(features[i], seen[i], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_layers", "expected"),
    [(3, (0, 1, 2)), (4, (1, 2, 3)), (5, (1, 3, 4)), (6, (1, 3, 5)), (7, (2, 3, 4)), (8, (2, 4, 5)), (32, (2, 16, 29))],
)
def test_default_layers_are_distinct(num_layers: int, expected: tuple[int, ...]) -> None:
    assert default_feature_layers(num_layers) == expected
    check_feature_layers(expected, num_layers=num_layers)


@pytest.mark.parametrize("layers", [(2, 2, 1), (1, 3, 2), (1, 2), (1, 2, 4), (-1, 1, 2)])
def test_layers_that_vllm_would_reorder_or_lose_are_refused(layers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="distinct rising"):
        Eagle3Config.of_target(tiny_llama(V, layers=4).config, feature_layers=layers)


def test_targets_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="no three distinct"):
        default_feature_layers(2)
    narrow = Eagle3Config.of_target(tiny_llama(V, layers=4).config, hidden_size=16, head_dim=4)
    with pytest.raises(ValueError, match="embeddings are"):
        Eagle3Draft(narrow).share_embeddings(torch.zeros(V, 32))
    _, head = target_and_head()
    with pytest.raises(ValueError, match="the vocabulary has 30"):
        head.set_vocabulary(draft_vocabulary(torch.ones(V), 30, vocab_size=V))


def test_a_new_head_takes_over_what_the_target_knows() -> None:
    target, head = target_and_head()
    torch.testing.assert_close(head.embed_tokens.weight, target.get_input_embeddings().weight)
    torch.testing.assert_close(head.lm_head.weight, target.lm_head.weight[head.vocabulary.ids])
    assert not head.embed_tokens.weight.requires_grad
    assert [n for n, p in head.named_parameters() if not p.requires_grad] == ["embed_tokens.weight"]

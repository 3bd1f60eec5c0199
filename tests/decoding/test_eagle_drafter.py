"""Speculative decoding with an EAGLE-3 head: nothing is lost, and what is proposed is what the head says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdlib.decoding.drafters import Drafter
from kdlib.decoding.eagle_drafter import EagleDrafter
from kdlib.decoding.speculative import speculative_generate
from kdlib.drafts.eagle3 import Eagle3Draft
from kdlib.drafts.eagle3_config import Eagle3Config
from kdlib.drafts.vocabulary import draft_vocabulary
from kdlib.head import Head
from tests.tiny import tiny_llama

V, NEW, GAMMA = 48, 24, 3


def pair(size: int = 40, **config: Any) -> tuple[Any, EagleDrafter]:
    """A target and a head that has learnt a little of it: its features alone say much of the next token but one."""
    target = tiny_llama(V, layers=4, eos_token_id=None)
    settings = Eagle3Config.of_target(target.config, draft_vocab_size=size, **config)
    vocabulary = draft_vocabulary(torch.arange(V), size, vocab_size=V)
    torch.manual_seed(0)
    head = Eagle3Draft.for_target(
        settings, embeddings=target.get_input_embeddings().weight, head=Head.of(target), vocabulary=vocabulary
    )
    fit(target, head)
    return target, EagleDrafter(head.eval())


def fit(target: Any, head: Eagle3Draft) -> None:
    """60 steps on the target's own greedy text."""
    ids = target.generate(torch.randint(8, V, (16, 3)), max_new_tokens=24, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        out = target(input_ids=ids, output_hidden_states=True)
    features = torch.cat([out.hidden_states[i] for i in head.config.feature_layers], -1)
    best = out.logits.argmax(-1)
    places = head.vocabulary.draft_ids
    optimizer = torch.optim.AdamW([p for p in head.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(60):
        loss = torch.zeros(())
        for j, hidden in enumerate(head.unroll(features, ids, steps=GAMMA)):
            wanted = places[best.roll(-1 - j, 1)][:, : -2 - j].flatten()
            logits = head.lm_head(hidden[:, : -2 - j]).flatten(0, 1)
            loss = loss + torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module")
def trained() -> tuple[Any, EagleDrafter]:
    return pair()


def prompts() -> tuple[Tensor, Tensor]:
    """Left-padded rows of length 1 to 7."""
    torch.manual_seed(4)
    lengths = torch.tensor([7, 3, 5, 1, 6])
    mask = (torch.arange(7) >= 7 - lengths[:, None]).long()
    return torch.randint(8, V, (5, 7)) * mask, mask


def test_it_is_a_drafter(trained: Any) -> None:
    assert isinstance(trained[1], Drafter)


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_greedy_output_is_the_targets(trained: Any, gamma: int) -> None:
    target, drafter = trained
    ids, mask = prompts()
    found = speculative_generate(target, drafter, ids, attention_mask=mask, max_new_tokens=NEW, gamma=gamma, pad_token_id=0)
    expected = target.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    assert torch.equal(found.sequences, expected)
    assert 0 < found.acceptance_rate < 1
    alone = [
        speculative_generate(target, drafter, row[m.bool()][None], max_new_tokens=NEW, gamma=gamma, pad_token_id=0)
        for row, m in zip(ids, mask, strict=True)
    ]
    assert torch.equal(found.accepted_per_position, torch.cat([one.accepted_per_position for one in alone]))
    assert found.rounds.tolist() == [int(one.rounds) for one in alone]


@pytest.mark.parametrize("config", [{}, {"norm_output": True, "norm_before_residual": True}])
def test_counters_are_those_of_chains_drafted_without_a_cache(config: dict[str, Any]) -> None:
    target, drafter = pair(V, **config)
    ids, _ = prompts()
    row = ids[:1]
    found = speculative_generate(target, drafter, row, max_new_tokens=NEW, gamma=GAMMA, pad_token_id=0)
    accepted, rounds = simulated(target, drafter.draft, found.sequences[:, : row.shape[1] + NEW], start=row.shape[1])
    assert found.accepted_per_position[0].tolist() == accepted
    assert int(found.rounds) == rounds


@torch.no_grad()
def simulated(target: Any, head: Eagle3Draft, ids: Tensor, *, start: int) -> tuple[list[int], int]:
    """Rounds over the target's own greedy text ``ids``, each draft from the whole prefix anew by ``unroll``."""
    out = target(input_ids=torch.cat([ids, ids[:, :GAMMA]], 1), output_hidden_states=True)
    features = torch.cat([out.hidden_states[i] for i in head.config.feature_layers], -1)
    text = ids[0].tolist() + [-1] * GAMMA
    follows = out.logits[0].argmax(-1).tolist()
    accepted, rounds, known = [0] * GAMMA, 0, start + 1
    while known < ids.shape[1]:
        prefix, drafts = text[:known], []
        for j in range(GAMMA):
            seen = torch.tensor([[*prefix, *drafts, 0]])
            hidden = head.unroll(features[:, : seen.shape[1]], seen, steps=j + 1)[j][:, known - 2]
            drafts.append(int(head.vocabulary.ids[head.lm_head(hidden).argmax()]))
        right = 0
        truth = [*text[known : ids.shape[1]], *follows[ids.shape[1] - 1 :]]
        while right < GAMMA and drafts[right] == truth[right]:
            accepted[right] += 1
            right += 1
        rounds, known = rounds + 1, known + right + 1
    return accepted, rounds


def test_sampling_with_a_head_draws_from_the_target(trained: Any) -> None:
    target, drafter = trained
    ids, mask = prompts()
    ids, mask = ids.repeat(40, 1), mask.repeat(40, 1)
    options = {"attention_mask": mask, "max_new_tokens": 12, "gamma": GAMMA, "temperature": 1.0, "pad_token_id": 0}
    found = speculative_generate(target, drafter, ids, seeds=list(range(len(ids))), **options)
    new = found.sequences[:, 7:]
    with torch.no_grad():
        full = torch.cat([mask, torch.ones_like(new)], 1)
        positions = (full.cumsum(1) - 1).clamp(min=0)
        logp = target(input_ids=found.sequences, attention_mask=full, position_ids=positions).logits[:, 6:-1].log_softmax(-1)
    drawn = logp.gather(-1, new[..., None])[..., 0]
    entropy = -(logp.exp() * logp).sum(-1)
    variance = (logp.exp() * logp.square()).sum(-1) - entropy.square()
    z = (-drawn - entropy).sum() / variance.sum().sqrt()
    assert abs(float(z)) < 3.5
    assert found.acceptance_rate > 0.1


def test_a_head_without_layers_is_refused() -> None:
    _, drafter = pair()
    drafter.draft.config.feature_layers = None
    with pytest.raises(ValueError, match="which layers"):
        EagleDrafter(drafter.draft)

"""Greedy speculative decoding against the target's own greedy tokens, and its counters against a loop without caches."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from kdlib.decoding import generate
from kdlib.decoding.drafters import ModelDrafter
from kdlib.decoding.speculative import SpeculativeOutput, speculative_generate
from kdlib.types import SamplingParams
from tests.decoding.test_sampling import LENGTHS, MODELS, V, prompts_of
from tests.tiny import tiny_llama

SHARED = Path(__file__).parents[2] / ".." / "shared"
needs_gsm8k = pytest.mark.skipif(not (SHARED / "models" / "gsm8k-lm").is_dir(), reason="no ../shared beside the project")


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def new_tokens(output: SpeculativeOutput, prompts: list[list[int]]) -> list[list[int]]:
    start = max(map(len, prompts))
    return [row[start : start + n] for row, n in zip(output.sequences.tolist(), output.lengths.tolist(), strict=True)]


def opposite(model: nn.Module) -> nn.Module:
    """Proposes what the model finds least likely."""
    found = copy.deepcopy(model)
    head: Any = found.get_output_embeddings()  # type: ignore[operator]
    head.weight = nn.Parameter(-head.weight.detach())
    return found


def noisy(model: nn.Module, scale: float = 0.05) -> nn.Module:
    """Agrees with the model often, not always."""
    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter += scale * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return found


DRAFTS = {"random": lambda target: tiny_llama(V, layers=1, seed=5), "opposite": opposite, "noisy": noisy, "itself": lambda x: x}


CASES = [("llama", kind) for kind in DRAFTS] + [(name, "noisy") for name in MODELS if name != "llama"]


@pytest.mark.parametrize(("name", "kind"), [*CASES, ("mistral, window 8", "opposite")])
def test_greedy_tokens_are_the_targets_own(name: str, kind: str) -> None:
    target, prompts = MODELS[name](), prompts_of()
    draft = DRAFTS[kind](target)
    free = generate(target, prompts, SamplingParams(max_tokens=20, temperature=0.0), seeds=range(6), pad_token_id=0)
    for gamma, stop_ids in ((1, ()), (4, (free[0].ids[2], free[2].ids[9], free[5].ids[0]))):
        params = SamplingParams(max_tokens=20, temperature=0.0, stop_ids=stop_ids)
        expected = [one.ids for one in generate(target, prompts, params, seeds=range(6), pad_token_id=0)]
        output = speculative_generate(target, draft, **padded(prompts), max_new_tokens=20, gamma=gamma, stop_ids=stop_ids)
        assert new_tokens(output, prompts) == expected
        assert output.lossless and output.forwards == output.rounds.max()
        if kind == "itself":
            assert output.acceptance_rate == 1 and output.acceptance_length == gamma + 1
        if gamma > 1:
            check_alone(target, draft, output, prompts=prompts, gamma=gamma, stop_ids=stop_ids)


def check_alone(
    target: nn.Module, draft: nn.Module, output: SpeculativeOutput, *, prompts: list[list[int]], **given: Any
) -> None:
    """Every row of the batch decoded by itself: the same tokens and counters."""
    for row, (prompt, new) in enumerate(zip(prompts, new_tokens(output, prompts), strict=True)):
        one = speculative_generate(target, draft, torch.tensor([prompt]), max_new_tokens=20, **given)
        assert new_tokens(one, [prompt]) == [new]
        for field in ("rounds", "drafted", "accepted_per_position"):
            assert torch.equal(getattr(one, field)[0], getattr(output, field)[row])


@torch.no_grad()
def simulate(target: Any, draft: Any, prompt: list[int], *, gamma: int, most: int, stops: set[int]) -> dict[str, Any]:
    """Speculative decoding as one would explain it: whole sequences, no cache, one row."""

    def best(model: Any, ids: list[int]) -> int:
        return int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())

    ids, accepted, rounds = [*prompt, best(target, prompt)], [0] * gamma, 0
    while len(ids) - len(prompt) < most and not stops & set(ids[len(prompt) :]):
        drafted: list[int] = []
        for _ in range(gamma):
            drafted.append(best(draft, ids + drafted))
        rounds += 1
        count = 0
        while count < gamma and best(target, ids + drafted[:count]) == drafted[count]:
            accepted[count] += 1
            count += 1
        ids += [*drafted[:count], best(target, ids + drafted[:count])]
    new = ids[len(prompt) :][:most]
    ends = [i for i, token in enumerate(new) if token in stops]
    return {"rounds": rounds, "accepted": accepted, "new": new[: ends[0] + 1] if ends else new}


@pytest.mark.parametrize("gamma", [1, 2, 5])
def test_counters_are_those_of_a_loop_without_caches(gamma: int) -> None:
    target, prompts = tiny_llama(V), prompts_of()
    draft = noisy(target, 0.1)
    stops = {generate(target, prompts, SamplingParams(max_tokens=9, temperature=0.0), seeds=range(6), pad_token_id=0)[3].ids[7]}
    expected = [simulate(target, draft, prompt, gamma=gamma, most=20, stops=stops) for prompt in prompts]
    output = speculative_generate(
        target, draft, **padded(prompts), max_new_tokens=20, gamma=gamma, stop_ids=tuple(stops), pad_token_id=7
    )
    assert new_tokens(output, prompts) == [one["new"] for one in expected]
    assert output.rounds.tolist() == [one["rounds"] for one in expected]
    assert output.accepted_per_position.tolist() == [one["accepted"] for one in expected]
    assert output.drafted.tolist() == [gamma * one["rounds"] for one in expected]
    assert 0.1 < output.acceptance_rate < 0.95  # a mixture, so that rows move differently
    total, rounds = sum(sum(one["accepted"]) for one in expected), sum(one["rounds"] for one in expected)
    assert output.acceptance_length == 1 + total / rounds and output.acceptance_rate == total / (gamma * rounds)
    ended = int(output.lengths.argmin())
    assert output.lengths[ended] < 20 and set(
        output.sequences[ended, max(LENGTHS) + int(output.lengths[ended]) :].tolist()
    ) == {7}


@pytest.mark.parametrize("most", [1, 2, 3])
def test_never_more_than_max_new_tokens(most: int) -> None:
    target, prompts = tiny_llama(V), prompts_of()
    expected = generate(target, prompts, SamplingParams(max_tokens=most, temperature=0.0), seeds=range(6), pad_token_id=0)
    output = speculative_generate(target, target, **padded(prompts), max_new_tokens=most, gamma=4, stop_ids=())
    assert output.sequences.shape == (6, max(LENGTHS) + most) and output.lengths.tolist() == [most] * 6
    assert new_tokens(output, prompts) == [one.ids for one in expected]
    # the round that is cut off counts whole, as vLLM counts it
    assert output.rounds.tolist() == [min(most - 1, 1)] * 6
    assert output.accepted_per_position.sum(-1).tolist() == [4 * min(most - 1, 1)] * 6
    assert math.isnan(output.acceptance_rate) == math.isnan(output.acceptance_length) == (most == 1)


@pytest.mark.parametrize(("context", "draft_context"), [(30, 512), (512, 21), (30, 23), (30, 9)])
def test_drafts_get_shorter_at_the_end_of_a_context(context: int, draft_context: int) -> None:
    target = MODELS["gpt2, learned positions"]()  # whose embedding ends where its context does
    target.config.n_positions, target.transformer.wpe = context, nn.Embedding.from_pretrained(_positions(context))
    draft = copy.deepcopy(target)
    draft.config.n_positions, draft.transformer.wpe = draft_context, nn.Embedding.from_pretrained(_positions(draft_context))
    prompts = prompts_of()
    expected = generate(target, prompts, SamplingParams(max_tokens=28, temperature=0.0), seeds=range(6), pad_token_id=0)
    output = speculative_generate(target, draft, **padded(prompts), max_new_tokens=28, gamma=4, stop_ids=())
    assert new_tokens(output, prompts) == [one.ids for one in expected]
    assert output.lengths.tolist() == [min(28, context - n) for n in LENGTHS]
    # the draft is the target wherever it may be used: a round reads up to the end of both contexts
    for row, n in enumerate(LENGTHS):
        known, end, drafted = n + 1, n + int(output.lengths[row]), 0
        while known < end:
            room = max(0, min(4, context - known, draft_context + 1 - known))
            drafted, known = drafted + room, known + room + 1
        assert output.drafted[row] == drafted == output.accepted_per_position[row].sum()


def _positions(n: int) -> Tensor:
    return 0.2 * torch.randn(512, 32, generator=torch.Generator().manual_seed(3))[:n]


def test_stop_ids_default_to_the_generation_config() -> None:
    target, prompts = tiny_llama(V), prompts_of()
    free = generate(target, prompts, SamplingParams(max_tokens=20, temperature=0.0), seeds=range(6), pad_token_id=0)
    for eos in (free[0].ids[4], [free[0].ids[4], free[1].ids[2]]):
        target.generation_config.eos_token_id = eos
        stops = (eos,) if isinstance(eos, int) else tuple(eos)
        outputs = [
            speculative_generate(target, target, **padded(prompts), max_new_tokens=20, gamma=3, stop_ids=stop_ids)
            for stop_ids in (None, stops)
        ]
        assert torch.equal(outputs[0].sequences, outputs[1].sequences) and outputs[0].lengths.min() < 20


def test_lenience_lets_likely_proposals_stand_and_says_so() -> None:
    target, prompts = tiny_llama(V), prompts_of()
    draft = noisy(target, 0.2)
    outputs = [
        speculative_generate(target, draft, **padded(prompts), max_new_tokens=24, gamma=3, lenience=lenience, stop_ids=())
        for lenience in (1.0, 3.0, 1e30)
    ]
    assert [one.lossless for one in outputs] == [True, False, False]
    assert outputs[0].acceptance_rate < outputs[1].acceptance_rate < outputs[2].acceptance_rate == 1
    with torch.no_grad():
        for sequence, mask in zip(outputs[1].sequences, (outputs[1].sequences != 0), strict=True):
            prompt = int((mask[: max(LENGTHS)]).sum())
            ids = sequence[max(LENGTHS) - prompt :]
            logp = target(input_ids=ids[None]).logits[0, prompt - 1 : -1].log_softmax(-1)
            chosen = logp.gather(-1, ids[prompt:, None])[:, 0]
            assert (chosen >= logp.amax(-1) - math.log(3) - 1e-4).all()  # never less likely than a third of the best


MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("gamma", {"gamma": 0}),
    ("lenience", {"lenience": 0.5}),
    ("max_tokens", {"max_new_tokens": 0}),
    ("top_p", {"top_p": 0.0}),
    ("temperature", {"temperature": -1.0}),
    ("draft_sampling", {"draft_sampling": "both"}),
    ("prompt 1 is empty", {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}),
    ("left-padded", {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}),
    ("left-padded", {"attention_mask": torch.ones(2, 4)}),
    ("2 prompts need as many seeds", {"seeds": [1]}),
    ("give tokenizer and draft_tokenizer", {"draft": tiny_llama(V + 8)}),
    ("fills the model's context", {"input_ids": torch.full((2, 512), 5)}),
    ("cannot go back", {"draft": MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1))}),
]


@pytest.mark.parametrize(("message", "change"), MISTAKES, ids=[message for message, _ in MISTAKES])
def test_mistakes_are_named(message: str, change: dict[str, Any]) -> None:
    target = tiny_llama(V)
    arguments = {"draft": target, "input_ids": torch.full((2, 3), 5), "max_new_tokens": 4, "gamma": 2, **change}
    with pytest.raises(ValueError, match=message):
        speculative_generate(target, **arguments)


class Spy(ModelDrafter):
    """A draft that also reads the target's hidden states, and keeps what it was told."""

    layers = (0, 1)

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__(model)
        self.rows_left: list[int] = []
        self.known: list[tuple[list[int], Tensor]] = []  # of each row: its tokens, the features of all but the last

    def start(self, ids: Tensor, *, padding: Tensor, features: Any) -> None:
        super().start(ids, padding=padding, features=features)
        states = torch.cat([features[layer] for layer in self.layers], dim=-1)
        self.known = [(ids[r, n:].tolist(), states[r, n:]) for r, n in enumerate(padding.tolist())]

    def commit(self, tokens: Tensor, *, accepted: Tensor, rows: Tensor, features: Any) -> None:
        super().commit(tokens, accepted=accepted, rows=rows, features=features)
        states = torch.cat([features[layer] for layer in self.layers], dim=-1)
        self.known = [
            (self.known[row][0] + tokens[r, : n + 1].tolist(), torch.cat([self.known[row][1], states[r, : n + 1]]))
            for r, (row, n) in enumerate(zip(rows.tolist(), accepted.tolist(), strict=True))
        ]
        self.check()

    def check(self) -> None:
        for ids, states in self.known:
            found = self.model(input_ids=torch.tensor([ids[:-1]]), output_hidden_states=True).hidden_states
            torch.testing.assert_close(
                states, torch.cat([found[layer][0] for layer in self.layers], dim=-1), atol=1e-4, rtol=1e-4
            )
        self.rows_left.append(len(self.known))


def test_a_drafter_gets_the_features_of_every_known_token_but_the_last() -> None:
    target, prompts = tiny_llama(V), prompts_of()
    spy = Spy(target)
    free = generate(target, prompts, SamplingParams(max_tokens=20, temperature=0.0), seeds=range(6), pad_token_id=0)
    stops = (free[0].ids[0], free[2].ids[5])
    output = speculative_generate(target, spy, **padded(prompts), max_new_tokens=16, gamma=2, stop_ids=stops)
    assert output.acceptance_rate == 1
    assert len(set(spy.rows_left)) > 1  # rows have left the batch on the way


@needs_gsm8k
def test_greedy_tokens_of_a_real_model() -> None:
    target = AutoModelForCausalLM.from_pretrained(SHARED / "models" / "gsm8k-lm").eval()
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "gsm8k-lm")
    draft = copy.deepcopy(target)
    draft.model.layers = draft.model.layers[:3]
    lines = (SHARED / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()[:8]
    prompts = [tokenizer(f"<|bos|><|user|>{json.loads(line)['question']}<|assistant|>")["input_ids"] for line in lines]
    params = SamplingParams(max_tokens=48, temperature=0.0, stop_ids=(2,))
    expected = [one.ids for one in generate(target, prompts, params, seeds=range(8), pad_token_id=0)]
    output = speculative_generate(target, draft, **padded(prompts), max_new_tokens=48, gamma=3)
    assert new_tokens(output, prompts) == expected
    assert output.acceptance_length > 1.1

"""Speculative sampling against exact probabilities of every short string, and against a loop without caches."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from scipy.stats import chi2
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kdlib.decoding import draw, filtered_log_probs
from kdlib.decoding.sampling import uniforms
from kdlib.decoding.spec_verify import Round
from kdlib.decoding.spec_vocabulary import SharedVocabulary
from kdlib.decoding.speculative import SpeculativeOutput, speculative_generate
from kdlib.types import SamplingParams
from tests.decoding.test_sampling import prompts_of
from tests.decoding.test_speculative import new_tokens, noisy, padded
from tests.tiny import tiny_llama

V, N, LENGTH = 6, 20_000, 4
PROMPT = [3, 1, 4]
SAMPLING: dict[str, dict[str, Any]] = {
    "T = 1": {"temperature": 1.0},
    "T = 0.7": {"temperature": 0.7},
    "top_p": {"temperature": 1.3, "top_p": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 3},
}


def params_of(given: dict[str, Any]) -> SamplingParams:
    return SamplingParams(max_tokens=LENGTH, **given)


def model(seed: int = 0, *, vocab_size: int = V) -> Any:
    return tiny_llama(vocab_size, hidden=16, layers=1, seed=seed, initializer_range=0.3, pad_token_id=None)


def pair() -> tuple[Any, Any]:
    """A target, and a draft that is neither much like it nor much unlike it."""
    return model(), noisy(model(), 0.3)


@torch.no_grad()
def tables(of: Any, params: SamplingParams, *, length: int = LENGTH) -> list[Tensor]:
    """Probabilities [V] * (i + 1) of the token after each string of i tokens, i = 0 .. length - 1."""
    found = []
    for i in range(length):
        strings = torch.tensor(list(itertools.product(range(V), repeat=i)), dtype=torch.long).view(V**i, i)
        ids = torch.cat([torch.tensor(PROMPT).expand(len(strings), -1), strings], dim=1)
        found.append(filtered_log_probs(of(input_ids=ids).logits[:, -1], params).double().exp().view([V] * (i + 1)))
    return found


def sample(target: Any, draft: Any, *, n: int = N, length: int = LENGTH, **given: Any) -> SpeculativeOutput:
    ids = torch.tensor(PROMPT).expand(n, -1)
    return speculative_generate(target, draft, ids, max_new_tokens=length, seeds=range(n), stop_ids=(), **given)


def p_value(strings: Tensor, exact: Tensor) -> float:
    """Of the chi-square statistic of ``strings`` [n, 4] against their ``exact`` probabilities, over the last three tokens."""
    index = (strings[:, 1:] * torch.tensor([V * V, V, 1])).sum(-1)
    observed = torch.bincount(index, minlength=V**3).double()
    expected = exact.sum(0).flatten() * len(strings)
    assert observed[expected == 0].sum() == 0  # what the filters cut off never comes
    rare = expected < 5
    cells = [(observed[~rare], expected[~rare]), (observed[rare].sum()[None], expected[rare].sum()[None])]
    seen, wanted = (torch.cat(side) for side in zip(*cells, strict=True))
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    return float(chi2.sf(float(((seen - wanted) ** 2 / wanted).sum()), df=len(wanted) - 1))


def joint(conditional: list[Tensor]) -> Tensor:
    """Probabilities of all strings, from those of each token after what is before it."""
    found = conditional[0]
    for table in conditional[1:]:
        found = found[..., None] * table
    return found


CASES = [
    ("T = 1", 1, "probabilistic"),
    ("T = 1", 3, "probabilistic"),
    ("T = 0.7", 2, "greedy"),
    ("top_p", 2, "probabilistic"),
    ("top_p", 1, "greedy"),
    ("top_k", 3, "probabilistic"),
    ("top_k", 3, "greedy"),
]


@pytest.mark.parametrize(("name", "gamma", "draft_sampling"), CASES)
def test_strings_have_the_targets_probabilities(name: str, gamma: int, draft_sampling: str) -> None:
    target, draft = pair()
    output = sample(target, draft, gamma=gamma, draft_sampling=draft_sampling, **SAMPLING[name])
    assert output.lossless and 0.1 < output.acceptance_rate < 0.9
    assert p_value(output.sequences[:, len(PROMPT) :], joint(tables(target, params_of(SAMPLING[name])))) > 1e-3


def test_lenience_is_lossy_and_bounded() -> None:
    target, draft = pair()
    exact = tables(target, params_of(SAMPLING["T = 1"]))
    output = sample(target, draft, gamma=3, temperature=1.0, lenience=2.0)
    assert not output.lossless
    assert p_value(output.sequences[:, len(PROMPT) :], joint(exact)) < 1e-9  # which the test above would have seen
    second = torch.bincount(output.sequences[:, len(PROMPT) + 1], minlength=V) / N
    bound = 2 * joint(exact[:2]).sum(0)
    assert (second <= bound + 4 * (bound.clamp(max=1) / N).sqrt()).all()
    assert output.acceptance_rate > sample(target, draft, gamma=3, temperature=1.0).acceptance_rate + 0.1


@pytest.mark.parametrize("name", ["T = 1", "top_p"])
def test_each_position_is_accepted_as_often_as_the_overlap_says(name: str) -> None:
    """P(first i proposals stand) = sum over strings of the product of min(p, q); for a greedy draft of p(argmax q)."""
    (target, draft), params = pair(), params_of(SAMPLING[name])
    p, q = tables(target, params), tables(draft, params)
    for draft_sampling in ("probabilistic", "greedy"):
        output = sample(target, draft, gamma=3, length=2, draft_sampling=draft_sampling, **SAMPLING[name])
        assert (output.rounds == 1).all()
        proposal = q if draft_sampling == "probabilistic" else [torch.eye(V).double()[table.argmax(-1)] for table in q]
        overlaps = [p[0], *(torch.minimum(a, b) for a, b in zip(p[1:], proposal[1:], strict=True))]
        for position in range(3):
            exact = float(joint(overlaps[: position + 2]).sum())
            found = float(output.accepted_per_position[:, position].double().mean())
            assert abs(found - exact) < 4 * (exact * (1 - exact) / N) ** 0.5


@torch.no_grad()
def simulate(target: Any, draft: Any, prompt: list[int], *, gamma: int, seed: int, params: SamplingParams) -> dict[str, Any]:
    """Leviathan's algorithm 1 on whole sequences of one row, with the row's random numbers."""
    uniform = uniforms(seed, params.max_tokens * (2 * gamma + 1)).view(params.max_tokens, -1)

    def log_probs(of: Any, ids: list[int]) -> Tensor:
        return filtered_log_probs(of(input_ids=torch.tensor([ids])).logits[0, -1], params)

    def drawn(logp: Tensor, number: Tensor) -> int:
        return int(draw(logp[None], number[None]))

    ids, rounds, counts = [*prompt, drawn(log_probs(target, prompt), uniform[0, -1])], 0, []
    while len(ids) - len(prompt) < params.max_tokens and not set(params.stop_ids) & set(ids[len(prompt) :]):
        rounds += 1
        drafted: list[int] = []
        q = []
        for j in range(gamma):
            q.append(log_probs(draft, ids + drafted).exp())
            drafted.append(drawn(q[-1].log(), uniform[rounds, j]))
        p = [log_probs(target, ids + drafted[:j]).exp() for j in range(gamma + 1)]
        ratios = [float(p[j][token] / q[j][token]) for j, token in enumerate(drafted)]
        n = next((j for j in range(gamma) if float(uniform[rounds, gamma + j]) >= ratios[j]), gamma)
        rest = p[n] if n == gamma else (p[n] - q[n]).clamp(min=0)
        ids += [*drafted[:n], drawn(rest.log(), uniform[rounds, -1])]
        counts.append(n)
    new = ids[len(prompt) :][: params.max_tokens]
    ends = [i for i, token in enumerate(new) if token in params.stop_ids]
    return {"new": new[: ends[0] + 1] if ends else new, "counts": counts}


@pytest.mark.parametrize("gamma", [1, 4])
@pytest.mark.parametrize(
    "given", [{"temperature": 0.8}, {"temperature": 1.2, "top_p": 0.8, "top_k": 20}], ids=["plain", "filtered"]
)
def test_batch_single_and_a_loop_without_caches_draw_the_same(gamma: int, given: dict[str, Any]) -> None:
    target, prompts = tiny_llama(96), prompts_of()
    draft = noisy(target, 0.2)
    stop_ids = tuple(range(3, 9))
    params = SamplingParams(max_tokens=16, stop_ids=stop_ids, **given)
    options = {"max_new_tokens": 16, "gamma": gamma, "stop_ids": stop_ids, **given}
    output = speculative_generate(target, draft, **padded(prompts), seeds=range(10, 16), **options)
    for row, (prompt, new) in enumerate(zip(prompts, new_tokens(output, prompts), strict=True)):
        expected = simulate(target, draft, prompt, gamma=gamma, seed=10 + row, params=params)
        assert new == expected["new"]
        assert int(output.rounds[row]) == len(expected["counts"])
        assert output.accepted_per_position[row].tolist() == [sum(n > i for n in expected["counts"]) for i in range(gamma)]
        alone = speculative_generate(target, draft, torch.tensor([prompt]), seeds=[10 + row], **options)
        assert new_tokens(alone, [prompt]) == [new]
    assert 0.1 < output.acceptance_rate < 0.95 and len(set(output.lengths.tolist())) > 1


def test_seeds_come_from_the_generator() -> None:
    target, ids = tiny_llama(96), torch.tensor([[5, 6, 7]] * 3)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, same, other = (
        speculative_generate(target, target, ids, max_new_tokens=12, gamma=2, temperature=1.0, generator=one).sequences
        for one in generators
    )
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert not torch.equal(first[0], first[1])  # rows of the same prompt have seeds of their own


def test_nothing_left_of_the_residual_falls_back_to_the_target() -> None:
    """p = q to the last bit, and yet a rejection (a number of exactly 1 cannot come, but rounding may act like one)."""
    logits = torch.randn(1, 1, V, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor([[0.3, 1.5, 0.5]], dtype=torch.float64)
    choices = Round(SamplingParams(max_tokens=1), uniform=uniform, one_hot=False, lenience=1.0)
    choices.choose(logits[:, 0])
    accepted, follows = choices.verify(logits.expand(1, 2, V), room=torch.tensor([1]))
    expected = draw(logits[:, 0].log_softmax(-1), torch.tensor([0.5], dtype=torch.float64))
    assert accepted.tolist() == [0] and follows.tolist() == expected.tolist()


def words(names: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names.split())}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize(("gamma", "draft_sampling"), [(1, "probabilistic"), (3, "probabilistic"), (2, "greedy")])
def test_a_draft_of_another_vocabulary_is_exact(gamma: int, draft_sampling: str) -> None:
    ours, theirs = words("a b c d e <unk>"), words("<unk> e z c y x a w")
    shared = SharedVocabulary(ours, theirs, sizes=(V, 8))
    assert shared.target_ids.tolist() == [0, 2, 4, 5] and shared.draft_ids.tolist() == [6, 3, 1, 0]
    target, draft = model(), model(1, vocab_size=8)
    given = SAMPLING["top_p"]
    output = sample(target, draft, gamma=gamma, draft_sampling=draft_sampling, tokenizer=ours, draft_tokenizer=theirs, **given)
    assert 0.1 < output.acceptance_rate < 0.9
    assert p_value(output.sequences[:, len(PROMPT) :], joint(tables(target, params_of(given)))) > 1e-3

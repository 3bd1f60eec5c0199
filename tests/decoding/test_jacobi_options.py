"""Options of Jacobi decoding: early exit, the pool, ends of contexts, 16 bits, seeds, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from kdlib.decoding import jacobi_generate
from kdlib.decoding.jacobi_pool import NgramPool
from tests.decoding.test_jacobi import NEW, SEEDS, VARIANTS, case, greedy, new_tokens, padded, simulate
from tests.decoding.test_sampling import LENGTHS, MODELS, V, prompts_of
from tests.tiny import tiny_llama


@pytest.mark.parametrize("name", ["llama", "trained", "mistral, window 8"])
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_an_early_exit_takes_blocks_as_they_are(name: str, iterations: int) -> None:
    model, prompts, free = case(name)
    output = jacobi_generate(
        model,
        **padded(prompts),
        max_new_tokens=NEW,
        block_size=6,
        max_iterations=iterations,
        init="random",
        seeds=SEEDS,
        stop_ids=(),
        return_trajectories=True,
    )
    expected = [
        simulate(model, prompt, n=6, most=NEW, init="random", seed=seed, iterations=iterations)
        for prompt, seed in zip(prompts, SEEDS, strict=True)
    ]
    assert new_tokens(output, prompts) == tuple(tuple(one["new"]) for one in expected)
    assert output.iterations.tolist() == [one["iterations"] for one in expected]
    assert [[states.tolist() for states in row] for row in output.trajectories or []] == [one["states"] for one in expected]
    assert not output.lossless and output.iterations.max() <= iterations
    if iterations == 1:
        assert output.passes.max() <= NEW // 6 and new_tokens(output, prompts) != free


def test_a_stop_token_among_those_taken_as_they_are_ends_a_row() -> None:
    model, prompts, _ = case("llama")
    given: dict[str, Any] = {"max_new_tokens": NEW, "block_size": 6, "max_iterations": 1, "init": "last"}
    free = new_tokens(jacobi_generate(model, **padded(prompts), stop_ids=(), **given), prompts)
    row = next(row for row in free if row[3] not in row[:3])
    output = jacobi_generate(model, **padded(prompts), stop_ids=(row[3],), **given)
    assert new_tokens(output, prompts) == tuple(
        tokens[: tokens.index(row[3]) + 1] if row[3] in tokens else tokens for tokens in free
    )


@pytest.mark.parametrize("variant", [*VARIANTS, "early exit"])
def test_rows_end_at_the_end_of_the_context(variant: str) -> None:
    model = MODELS["gpt2, learned positions"]()  # whose embedding ends where its context does
    prompts = prompts_of()
    expected = tuple(tuple(greedy(model, prompt, most=min(28, 30 - len(prompt)))) for prompt in prompts)
    weight = model.transformer.wpe.weight[:30].detach()
    model.config.n_positions, model.transformer.wpe = 30, nn.Embedding.from_pretrained(weight)
    options = {"max_iterations": 2} if variant == "early exit" else VARIANTS[variant]
    output = jacobi_generate(model, **padded(prompts), max_new_tokens=28, block_size=7, stop_ids=(), **options)
    assert output.lengths.tolist() == [min(28, 30 - n) for n in LENGTHS]
    assert variant == "early exit" or new_tokens(output, prompts) == expected


@torch.no_grad()
def test_in_16_bits_the_first_difference_is_a_near_tie() -> None:
    differences = 0
    for seed in range(4):
        model = tiny_llama(V, hidden=64, seed=seed).to(torch.bfloat16)
        prompts = prompts_of((6,) * 8, seed=seed)
        plain = [greedy(model, prompt, most=NEW) for prompt in prompts]
        output = jacobi_generate(model, **padded(prompts), max_new_tokens=NEW, block_size=8, stop_ids=())
        exact = model.to(torch.float32)
        for prompt, one, other in zip(prompts, plain, new_tokens(output, prompts), strict=True):
            first = next((i for i in range(NEW) if one[i] != other[i]), None)
            if first is None:
                continue
            differences += 1
            logits = exact(input_ids=torch.tensor([prompt + one[:first]])).logits[0, -1]
            best, ids = logits.topk(2)
            ulp = 2.0 ** (math.floor(math.log2(best[0].abs())) - 7)
            assert best[0] - best[1] <= 6 * ulp
            assert {one[first], other[first]} == set(ids.tolist())
    assert 0 < differences < 16  # of 32 texts


def test_seeds_say_it_all_and_come_from_the_generator() -> None:
    model, prompts, _ = case("llama")
    given: dict[str, Any] = {
        "max_new_tokens": 16,
        "block_size": 8,
        "init": "random",
        "stop_ids": (),
        "return_trajectories": True,
    }

    def states(**seeded: Any) -> list[Any]:
        output = jacobi_generate(model, **padded(prompts), **given, **seeded)
        return [[one.tolist() for one in row] for row in output.trajectories or []]

    assert states(generator=torch.Generator().manual_seed(3)) == states(generator=torch.Generator().manual_seed(3))
    assert states(generator=torch.Generator().manual_seed(3)) != states(generator=torch.Generator().manual_seed(4))
    swapped = states(seeds=[5, 4, 3, 2, 1, 9])
    assert swapped != states(seeds=SEEDS) and swapped[5] == states(seeds=[0, 0, 0, 0, 0, 9])[5]


def test_the_pool_goes_on_from_where_a_token_stands_in_a_rejected_tail() -> None:
    pool = NgramPool(2, size=2, n=4, device=torch.device("cpu"))
    buffer, width = torch.tensor([[5, 1, 1, 1], [6, 1, 1, 1]]), torch.tensor([4, 2])
    assert not pool.alternatives(buffer, width=width)[1].any()
    pool.add(torch.tensor([[9, 5, 7, 5], [8, 6, 1, 2]]), lengths=torch.tensor([4, 4]))
    found, some = pool.alternatives(buffer, width=width)
    assert found[0, 1].tolist() == [5, 7, 5, 1]  # its first 5, then the buffer's own
    assert found[1, 1].tolist() == [6, 1, 2, 1] and some.tolist() == [[False, True], [False, False]]  # differs beyond the width
    pool.add(torch.tensor([[5, 2, 3, 4, 9], [6, 3, 3, 3, 3]]), lengths=torch.tensor([3, 1]))
    found, some = pool.alternatives(buffer, width=width)
    assert found[0].tolist() == [[5, 7, 5, 1], [5, 2, 3, 1]] and some[0].all()
    assert not some[1].any()  # a tail of one token continues nothing, and is not taken in
    pool.add(torch.tensor([[4, 3], [6, 2]]), lengths=torch.tensor([2, 2]))
    found, some = pool.alternatives(buffer, width=width)
    assert found[0].tolist() == [[5, 2, 3, 1], [5, 1, 1, 1]] and some.tolist() == [
        [True, False],
        [False, True],
    ]  # the oldest is gone
    pool.keep(torch.tensor([1]))
    assert pool.alternatives(buffer[1:], width=width[1:])[0].tolist() == [[[6, 1, 2, 1], [6, 2, 1, 1]]]


MAMBA = MambaForCausalLM(MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1))
MISTAKES: list[tuple[str, dict[str, Any]]] = [
    ("block_size 0: choose 1 to max_new_tokens, which is 4", {"block_size": 0}),
    ("block_size 5: choose 1 to max_new_tokens, which is 4", {"block_size": 5}),
    ("block_size 2: choose 1 to max_new_tokens, which is 0", {"max_new_tokens": 0}),
    ("init 'noise': choose prompt, random, last", {"init": "noise"}),
    ("init gave tokens of shape", {"init": lambda unknown: unknown.position[:1]}),
    ("max_iterations 0: choose at least 1", {"max_iterations": 0}),
    ("blocks 0", {"blocks": 0}),
    ("pool -1", {"pool": -1}),
    ("spawn_ratio 0.0", {"spawn_ratio": 0.0}),
    ("spawn_ratio 1.5", {"spawn_ratio": 1.5}),
    ("drop it, or blocks=2", {"sliding_window": True, "blocks": 2}),
    ("max_iterations is for single blocks", {"max_iterations": 2, "blocks": 2}),
    ("max_iterations is for single blocks", {"max_iterations": 2, "sliding_window": True}),
    ("max_iterations is for single blocks", {"max_iterations": 2, "pool": 1}),
    ("return_trajectories is for single blocks", {"return_trajectories": True, "pool": 1}),
    ("return_trajectories is for single blocks", {"return_trajectories": True, "blocks": 2}),
    ("return_trajectories is for single blocks", {"return_trajectories": True, "sliding_window": True}),
    ("prompt 0 is empty", {"input_ids": torch.zeros(2, 0, dtype=torch.long)}),
    ("prompt 1 is empty", {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}),
    ("left-padded", {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}),
    ("left-padded", {"attention_mask": torch.ones(2, 4)}),
    ("2 prompts need as many seeds", {"seeds": [1]}),
    ("fills the model's context", {"input_ids": torch.full((2, 512), 5)}),
    ("cannot go back", {"model": MAMBA}),
]


@pytest.mark.parametrize(("message", "change"), MISTAKES, ids=[f"{message}-{i}" for i, (message, _) in enumerate(MISTAKES)])
def test_mistakes_are_named(message: str, change: dict[str, Any]) -> None:
    arguments = {"model": tiny_llama(V), "input_ids": torch.full((2, 3), 5), "max_new_tokens": 4, "block_size": 2, **change}
    with pytest.raises(ValueError, match=message) as error:
        jacobi_generate(arguments.pop("model"), arguments.pop("input_ids"), **arguments)
    assert "\n" not in str(error.value)

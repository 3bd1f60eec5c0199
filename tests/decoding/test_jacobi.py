"""Jacobi decoding against a greedy loop without a cache; its counters and states against whole texts read again and again."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kdlib.decoding import JacobiOutput, jacobi_generate
from kdlib.decoding.jacobi_init import Init, Unknown
from kdlib.decoding.sampling import uniforms
from tests.decoding.test_sampling import LENGTHS, V, prompts_of
from tests.decoding.test_sampling import MODELS as RANDOM
from tests.tiny import tiny_llama

NEW = 24
SEEDS = range(10, 16)
CYCLE = (7, 30, 4, 51, 22, 63, 9)


@cache
def trained() -> nn.Module:
    """Goes on with a cycle of tokens, mostly also where what it reads at the end is no part of it."""
    model = tiny_llama(V)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(120):
        start = torch.randint(len(CYCLE), (16, 1), generator=generator)
        text = torch.tensor(CYCLE)[(start + torch.arange(33)) % len(CYCLE)]
        length = torch.randint(8, 33, (16, 1), generator=generator)
        noise = torch.randint(3, V, (16, 32), generator=generator)
        wrong = (torch.arange(32) >= length) & (torch.arange(32) < length + 6)
        logits = model(input_ids=torch.where(wrong, noise, text[:, :-1])).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def cycle_prompts() -> list[list[int]]:
    return [[CYCLE[(row + i) % len(CYCLE)] for i in range(10 + 2 * row)] for row in range(4)] + prompts_of((5, 9))


@cache
def case(name: str) -> tuple[Any, tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """A model, prompts of different lengths, and what greedy decoding of each of them gives."""
    model = trained() if name == "trained" else RANDOM[name]()
    prompts = cycle_prompts() if name == "trained" else prompts_of()
    return model, tuple(map(tuple, prompts)), tuple(tuple(greedy(model, prompt, most=NEW)) for prompt in prompts)


@torch.no_grad()
def greedy(model: Any, prompt: list[int], *, most: int, stops: tuple[int, ...] = ()) -> list[int]:
    """One token at a time, the whole text each time."""
    ids = list(prompt)
    while len(ids) < len(prompt) + most and not set(ids[len(prompt) :]) & set(stops):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def padded(prompts: Any, *, pad: int = 0) -> dict[str, Tensor]:
    longest = max(map(len, prompts))
    ids = [[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def new_tokens(output: JacobiOutput, prompts: Any) -> tuple[tuple[int, ...], ...]:
    start = max(map(len, prompts))
    rows = zip(output.sequences.tolist(), output.lengths.tolist(), strict=True)
    return tuple(tuple(row[start : start + n]) for row, n in rows)


def from_numbers(unknown: Unknown) -> Tensor:
    """Any token, from the row's own numbers."""
    return (unknown.uniform * V).long()


INITS: list[Init] = ["prompt", "random", "last", from_numbers]
VARIANTS: dict[str, dict[str, Any]] = {
    "blocks": {},
    "sliding window": {"sliding_window": True},
    "2 blocks": {"blocks": 2},
    "3 blocks": {"blocks": 3, "spawn_ratio": 0.4},
    "pool of 1": {"pool": 1},
    "pool of 4": {"pool": 4},
    "sliding window, pool of 4": {"sliding_window": True, "pool": 4},
    "3 blocks, pool of 2": {"blocks": 3, "spawn_ratio": 0.5, "pool": 2},
    "as many iterations as tokens": {"max_iterations": NEW},
}


@pytest.mark.parametrize("init", INITS, ids=lambda init: init if isinstance(init, str) else init.__name__)
@pytest.mark.parametrize("block_size", [1, 2, 3, 8, 16, NEW])
@pytest.mark.parametrize("name", ["llama", "trained"])
def test_any_block_size_and_first_guess_gives_the_greedy_tokens(name: str, block_size: int, init: Init) -> None:
    model, prompts, expected = case(name)
    output = jacobi_generate(
        model, **padded(prompts), max_new_tokens=NEW, block_size=block_size, init=init, seeds=SEEDS, stop_ids=()
    )
    assert new_tokens(output, prompts) == expected and output.lossless
    assert output.lengths.tolist() == [NEW] * 6 and output.sequences.shape == (6, max(map(len, prompts)) + NEW)
    assert torch.equal(output.iterations.sum(-1), output.passes) and output.forwards == output.passes.max() < NEW
    complete = output.iterations[:, : (NEW - 1) // block_size]
    assert ((complete >= 1) & (complete <= block_size)).all()
    assert output.tokens_per_forward == 6 * (NEW - 1) / int(output.passes.sum())
    if block_size == 1:
        assert output.tokens_per_forward == 1


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["llama", "trained", "mistral, window 8", "gemma 3, windows of 6", "gpt2, learned positions"])
def test_every_variant_gives_the_greedy_tokens_and_rows_alone_the_same(name: str, variant: str) -> None:
    model, prompts, expected = case(name)
    given = {"max_new_tokens": NEW, "block_size": 5, "stop_ids": (), "init": "random", **VARIANTS[variant]}
    output = jacobi_generate(model, **padded(prompts), seeds=SEEDS, **given)
    assert new_tokens(output, prompts) == expected
    assert torch.equal(output.iterations.sum(-1), output.passes) and output.passes.max() < NEW
    for row in (0, 3):
        one = jacobi_generate(model, torch.tensor([prompts[row]]), seeds=[SEEDS[row]], **given)
        assert new_tokens(one, [prompts[row]]) == (expected[row],)
        assert torch.equal(one.iterations[0], output.iterations[row])


def guesses(init: str, prompt: Any, *, seed: int, position: range, last: int) -> list[int]:
    if init == "random":
        numbers = uniforms(seed, 2 * NEW).tolist()
        return [prompt[int(numbers[p] * len(prompt))] for p in position]
    return [prompt[p % len(prompt)] if init == "prompt" else last for p in position]


@torch.no_grad()
def simulate(
    model: Any,
    prompt: Any,
    *,
    n: int,
    most: int,
    init: str,
    seed: int,
    stops: tuple[int, ...] = (),
    iterations: int | None = None,
) -> dict[str, Any]:
    """Jacobi decoding as one would explain it: known tokens, then guesses up to the block's end; whole texts, no cache."""

    def fresh(position: int, block: int) -> list[int]:
        return guesses(init, prompt, seed=seed, position=range(position, (block + 1) * n), last=known[-1])

    def ended() -> bool:
        return len(known) >= most or bool(set(known) & set(stops))

    known = [int(model(input_ids=torch.tensor([list(prompt)])).logits[0, -1].argmax())]
    block, guess, counts, states = 0, fresh(1, 0), [0] * -(-most // n), {}
    while not ended():
        counts[block] += 1
        states.setdefault(block, []).append((known + guess)[block * n :])
        logits = model(input_ids=torch.tensor([[*prompt, *known, *guess]])).logits[0]
        best = logits[len(prompt) + len(known) - 1 :].argmax(-1).tolist()
        matched = next((i for i, (a, b) in enumerate(zip(guess, best, strict=False)) if a != b), len(guess))
        known += best[: matched + 1]
        if matched == len(guess):
            block += 1
            guess = fresh(block * n + 1, block)
        elif counts[block] == iterations:
            known += best[matched + 1 : -1]
            block += 1
            guess = [best[-1], *fresh(block * n + 1, block)]
        else:
            guess = best[matched + 1 : -1]
    ends = [i + 1 for i, token in enumerate(known) if token in stops]
    new = known[: min([most, *ends])]
    trace = []
    for b in range(-(-len(new) // n)):
        part = new[b * n : (b + 1) * n]
        all_states = [state[: len(part)] for state in states.get(b, [])] + [part]
        trace.append([state for i, state in enumerate(all_states) if i == 0 or state != all_states[i - 1]])
    return {"new": new, "iterations": counts, "states": trace}


@pytest.mark.parametrize(("block_size", "init"), [(1, "prompt"), (4, "random"), (7, "last"), (16, "prompt")])
@pytest.mark.parametrize("name", ["llama", "trained"])
def test_iterations_and_states_are_those_of_a_loop_without_caches(name: str, block_size: int, init: Any) -> None:
    model, prompts, free = case(name)
    stops = (free[1][9], free[3][17])
    output = jacobi_generate(
        model,
        **padded(prompts),
        max_new_tokens=NEW,
        block_size=block_size,
        init=init,
        seeds=SEEDS,
        stop_ids=stops,
        return_trajectories=True,
    )
    rows = zip(prompts, SEEDS, strict=True)
    expected = [simulate(model, prompt, n=block_size, most=NEW, init=init, seed=seed, stops=stops) for prompt, seed in rows]
    assert new_tokens(output, prompts) == tuple(tuple(one["new"]) for one in expected)
    assert output.iterations.tolist() == [one["iterations"] for one in expected]
    assert output.trajectories is not None and output.lengths.min() < NEW
    assert [[states.tolist() for states in row] for row in output.trajectories] == [one["states"] for one in expected]


def test_a_predictable_text_takes_fewer_passes() -> None:
    model, prompts, _ = case("trained")
    passes = {}
    for variant, options in VARIANTS.items():
        output = jacobi_generate(
            model,
            **padded(prompts[:4]),
            max_new_tokens=NEW,
            block_size=8,
            init="random",
            seeds=SEEDS[:4],
            stop_ids=(),
            **options,
        )
        passes[variant] = int(output.passes.sum())
    single = passes.pop("blocks")
    assert 4 * (NEW - 1) / single > 1.3
    assert passes.pop("as many iterations as tokens") == single > max(passes.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_end_at_their_first_stop_token_and_guesses_stop_nothing(variant: str) -> None:
    model, prompts, free = case("trained")
    stops = (free[0][5], free[4][2])
    expected = tuple(tuple(greedy(model, prompt, most=NEW, stops=stops)) for prompt in prompts)
    for init in (lambda unknown: torch.full_like(unknown.position, stops[0]), "prompt"):
        output = jacobi_generate(
            model,
            **padded(prompts),
            max_new_tokens=NEW,
            block_size=8,
            init=init,
            stop_ids=stops,
            pad_token_id=90,
            **VARIANTS[variant],
        )
        assert new_tokens(output, prompts) == expected
        columns = torch.arange(NEW)
        assert (output.sequences[:, -NEW:][columns >= output.lengths[:, None]] == 90).all()
        assert len(set(output.lengths.tolist())) > 2
    free_of_stops = jacobi_generate(
        model, **padded(prompts), max_new_tokens=NEW, block_size=8, stop_ids=stops, stop_at_eos=False, **VARIANTS[variant]
    )
    assert new_tokens(free_of_stops, prompts) == free


def test_eos_inside_a_prompt_and_as_padding_is_a_token_like_others() -> None:
    model = RANDOM["llama"]()
    plain = prompts_of()
    eos = greedy(model, plain[2], most=NEW)[6]
    prompts = [[*prompt[:2], eos, *prompt[2:]] for prompt in plain]
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = eos
    expected = tuple(tuple(greedy(model, prompt, most=NEW, stops=(eos,))) for prompt in prompts)
    for options in ({}, {"sliding_window": True, "pool": 2}, {"blocks": 2}):
        output = jacobi_generate(model, **padded(prompts, pad=eos), max_new_tokens=NEW, block_size=6, **options)
        assert new_tokens(output, prompts) == expected
        assert (output.sequences[:, -NEW:][torch.arange(NEW) >= output.lengths[:, None]] == eos).all()


def test_a_row_that_ends_with_its_first_token_takes_no_pass() -> None:
    model, prompts, free = case("llama")
    first = tuple({tokens[0] for tokens in free})
    output = jacobi_generate(model, **padded(prompts), max_new_tokens=8, block_size=4, stop_ids=first, return_trajectories=True)
    assert output.lengths.tolist() == [1] * 6 and output.forwards == 0 == output.iterations.sum()
    assert output.tokens_per_forward != output.tokens_per_forward  # NaN
    assert [[x.tolist() for x in row] for row in output.trajectories or []] == [[[[tokens[0]]]] for tokens in free]
    assert (output.sequences[:, max(LENGTHS) + 1 :] == 0).all()

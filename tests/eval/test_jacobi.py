"""Counts of Jacobi decoding against loops over their definitions, and against decoding without a cache."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from kdlib.eval import JacobiResult, jacobi
from kdlib.eval.jacobi_measurement import agreement
from kdlib.eval.jacobi_report import change_of, check_line, jacobi_lines, jacobi_sections, jacobi_table
from kdlib.eval.jacobi_statistics import Passes, block_counts, by_block, trajectory_statistics
from kdlib.eval.losslessness import Difference, GreedyCheck
from tests.tiny import tiny_llama, tiny_tokenizer

VOCAB = 40
PROMPTS = [[1, 5 + i, 9 + 2 * i, *range(10, 10 + i % 3)] for i in range(10)]
CHANCE = {"resamples": 50, "seed": 0}
MODEL = tiny_llama(VOCAB, seed=0, eos_token_id=None)


def states_of(seed: int, *, count: int, n: int) -> Tensor:
    """Distinct-looking states over two tokens, so that places agree by chance."""
    return torch.randint(0, 2, (count, n), generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 10_000), st.integers(1, 8), st.integers(1, 10))
def test_block_counts_are_their_definitions(seed: int, count: int, n: int) -> None:
    states = states_of(seed, count=count, n=n).tolist()
    final = states[-1]
    prefix = []
    for state in states:
        length = 0
        while length < n and state[length] == final[length]:
            length += 1
        prefix.append(length)
    stationary = 0
    for p in range(n):
        stationary += any(
            p > prefix[k] and all(states[m][p] == final[p] for m in range(k, len(states))) for k in range(len(states))
        )
    found = block_counts(torch.tensor(states))
    assert found.iterations == count - 1 and found.stationary == stationary
    assert found.gained == sum(prefix[k] - prefix[k - 1] for k in range(1, count))


def test_a_trajectory_by_hand() -> None:
    """y* = 7 1 2 3 4; the third and the last token are right before the second, the fourth is not for good."""
    states = [[7, 0, 2, 3, 9], [7, 1, 2, 0, 4], [7, 1, 2, 3, 4]]
    found = block_counts(torch.tensor(states))
    assert (found.iterations, found.gained, found.stationary) == (2, 4, 2)  # c = 1, 3, 5
    statistics = trajectory_statistics([[torch.tensor(states), torch.tensor([[5]])], []], **CHANCE)
    assert statistics is not None and statistics.blocks == 1
    assert statistics.fast_forward.value == 2.0 and statistics.fast_forwarded.value == 2.0
    assert statistics.stationary.value == 2.0 and statistics.stationary.low is None  # one prompt has no interval
    assert trajectory_statistics([[torch.tensor([[7, 1, 2]])]], **CHANCE) is None  # nothing was wrong


def test_tokens_and_passes_by_block() -> None:
    """Block size 4: the first row has all of two blocks, the second stops with the token that opens its second block."""
    counts = Passes(
        block_size=4,
        lengths=np.array([8, 5, 1]),
        passes=np.array([5, 2, 0]),
        iterations=np.array([[3, 2], [2, 0], [0, 0]]),
    )
    first, second = by_block(counts, **CHANCE)
    assert (first.tokens, first.passes, first.prompts) == (8, 5, 2)
    assert (second.tokens, second.passes, second.prompts) == (3, 2, 1)
    assert first.tokens_per_forward.value == 8 / 5 and second.tokens_per_forward.value == 3 / 2
    assert first.tokens + second.tokens == counts.per_prompt.of.sum()
    assert counts.distribution == [(2, 2), (3, 1)]


# --- a model


def passes_without_a_cache(model: Any, prompt: list[int], *, n: int, new: int) -> tuple[list[int], list[int], list[list[Any]]]:
    """(new tokens, passes of each block, the states of each block): all text is read anew in every pass."""

    def after(ids: list[int]) -> list[int]:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].argmax(-1).tolist()

    text, passes, trajectories = [*prompt, after(prompt)[-1]], [], []
    for first in range(0, new, n):
        start, size, last = len(prompt) + first, min(n, new - first), first + n >= new
        block = [text[-1], *(prompt[(first + j) % len(prompt)] for j in range(1, size))]
        states, count, settled = [block], 0, False
        while not settled:
            count += 1
            said = after(text[:start] + block)[start:]
            right = next((j for j in range(1, size) if block[j] != said[j - 1]), size)
            settled = right == size or (last and right + 1 == size)  # the keys of the very last token are never needed
            block = [block[0], *said[:-1]]
            if block != states[-1]:
                states.append(block)
        passes.append(count)
        trajectories.append(states)
        text = [*text[:start], *block, *([] if last else said[-1:])]
    return text[len(prompt) :], passes, trajectories


def test_counts_are_those_of_decoding_without_a_cache() -> None:
    result = jacobi(MODEL, PROMPTS, block_size=8, max_new_tokens=20, batch_size=4, timing=False)
    expected = [passes_without_a_cache(MODEL, prompt, n=8, new=20) for prompt in PROMPTS]
    assert result.outputs == [tokens for tokens, _, _ in expected]
    passes = np.array([passes for _, passes, _ in expected])
    np.testing.assert_array_equal(result.counts.iterations, passes)
    assert result.tokens_per_forward.value == pytest.approx(19 * len(PROMPTS) / passes.sum())
    assert result.tokens_per_forward.low is not None and result.tokens_per_forward.high is not None
    assert result.tokens_per_forward.low < result.tokens_per_forward.value < result.tokens_per_forward.high
    assert result.iterations_per_block.value == pytest.approx(passes.mean())
    assert [of.passes for of in result.by_block] == passes.sum(0).tolist()
    blocks = [[torch.tensor(states) for states in row] for _, _, row in expected]
    assert result.trajectories == trajectory_statistics(blocks, resamples=2000, seed=0)
    assert result.check is not None and result.passed and result.check.identical == len(PROMPTS)


def test_the_json_is_whole_and_says_what_it_counts() -> None:
    result = jacobi(MODEL, PROMPTS[:4], block_size=4, max_new_tokens=12, timing_prompts=2)
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert content == result.to_json()
    assert content["block_size"] == 4 and content["prompts"] == 4 and content["passed"] is True
    assert content["new_tokens"] == 48 and content["passes"] == sum(of["passes"] for of in content["by_block"])
    assert sum(of["blocks"] for of in content["iterations_distribution"]) == 12
    assert {"tokens_per_forward", "by_block", "iterations_per_block", "stationary", "timing"} <= content["counted"].keys()
    timing = content["timing"]
    assert timing["prompts"] == 2 and timing["greedy_forwards"] == 22 and 6 <= timing["forwards"] <= 22
    ratio = timing["tokens_per_second"] / timing["greedy_tokens_per_second"]
    assert timing["speedup"]["value"] == pytest.approx(ratio) and timing["machine"]


@pytest.mark.parametrize(
    "options", [{"sliding_window": True}, {"blocks": 2}, {"pool": 2}, {"init": "random"}, {"init": "last"}]
)
def test_every_decoder_gives_the_models_own_tokens(options: dict[str, Any]) -> None:
    result = jacobi(MODEL, PROMPTS[:4], block_size=4, max_new_tokens=12, timing=False, **options)
    assert result.check is not None and result.check.identical == 4
    assert result.counts.per_prompt.of.sum() == 4 * 11 == sum(of.tokens for of in result.by_block)
    assert (result.trajectories is None) == ("init" not in options)


def test_a_decoder_that_is_not_lossless_is_not_checked() -> None:
    result = jacobi(MODEL, PROMPTS, block_size=8, max_new_tokens=16, max_iterations=2, timing=False)
    assert not result.lossless and result.check is None and result.trajectories is None and result.passed
    assert result.agreement is not None and result.agreement.identical < len(PROMPTS)
    assert check_line(result).startswith("not lossless: ")
    assert result.iterations_per_block.value <= 2
    exact = jacobi(MODEL, PROMPTS, block_size=8, max_new_tokens=16, timing=False, checks=False)
    assert exact.agreement is None and exact.check is None
    assert result.agreement == agreement(result.outputs, exact.outputs)


def test_agreement_counts_common_prefixes() -> None:
    found = agreement([[1, 2, 3], [1, 9, 3], [4]], [[1, 2, 3], [1, 2, 3], [4, 5]])
    assert (found.identical, found.tokens, found.common, found.share) == (1, 8, 5, 5 / 8)


def failed(result: JacobiResult) -> JacobiResult:
    check = GreedyCheck(prompts=4, identical=3, differences=(Difference(prompt=1, position=2, gap=math.inf),), tolerance=1e-4)
    return replace(result, check=check)


def test_several_results_side_by_side() -> None:
    base = jacobi(MODEL, PROMPTS, block_size=4, max_new_tokens=12, timing_prompts=2)
    other = tiny_llama(VOCAB, seed=1, eos_token_id=None)
    trained = jacobi(other, base.prompts, block_size=4, max_new_tokens=12, timing=False)
    results = {"base": base, "trained": failed(trained)}
    lines = jacobi_lines(results)
    change = change_of(trained, base).value
    assert change == pytest.approx(trained.tokens_per_forward.value / base.tokens_per_forward.value - 1)
    assert f"trained against base: tokens per forward {change:+.1%}" in lines[-1]
    assert any(line.startswith("trained: ") and "FAILED" in line for line in lines)
    assert not results["trained"].passed and not results["trained"].to_json()["passed"]
    console = Console(width=240, record=True, file=io.StringIO())
    console.print(jacobi_table(results))
    text = console.export_text()
    assert f"{base.tokens_per_forward.value:.3f}" in text and f"{trained.tokens_per_forward.value:.3f}" in text
    titles = [getattr(block, "title", "") for section in jacobi_sections(results) for block in section.blocks]
    assert titles[0] == "Tokens per forward by block"
    assert "Iterations per block, base" in titles and "Iterations per block, trained" in titles


def test_paths_texts_and_a_stop_token(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_llama(len(tokenizer))
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path)
    options = {"block_size": 4, "max_new_tokens": 12, "timing": False}
    first = jacobi(str(tmp_path), ["What is two?", "Is the sky blue?"], **options)
    assert first.settings["model"] == str(tmp_path) and len(first.prompts) == 2
    stop = first.outputs[0][5]
    ended = jacobi(model, first.prompts, stop_ids=[stop], **options)
    at = first.outputs[0].index(stop)
    assert ended.outputs[0] == first.outputs[0][: at + 1] and ended.passed


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (PROMPTS, {"block_size": 13}, "block_size 13: choose 1 to max_new_tokens, which is 12"),
        (PROMPTS, {"max_new_tokens": 512}, "leaves no room for a prompt in a context of 512"),
        (PROMPTS, {"init": "lucky"}, "init 'lucky'"),
        (PROMPTS, {"sliding_window": True, "blocks": 2}, "sliding_window has no blocks"),
        ([[1, 2], []], {}, "prompt 1 is empty"),
        ([], {}, "there are no prompts"),
        (["a text"], {}, "need a tokenizer"),
    ],
)
def test_mistakes_are_one_line(prompts: list[Any], options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        jacobi(MODEL, prompts, **{"block_size": 4, "max_new_tokens": 12, "timing": False, **options})
    assert "\n" not in str(error.value)


def test_responses_of_one_token_have_nothing_to_average() -> None:
    with pytest.raises(ValueError, match="nothing to average"):
        jacobi(MODEL, PROMPTS, block_size=4, max_new_tokens=12, stop_ids=range(VOCAB), timing=False)

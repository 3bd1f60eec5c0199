"""diffusion_generate: rows of a batch, ends, draws, shifted models, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from kdlib.decoding import diffusion_generate
from kdlib.decoding.diffusion_step import Step, Strategy
from kdlib.decoding.strategies import (
    CoherentContext,
    ConfidenceThreshold,
    EntropyThreshold,
    Factor,
    LowConfidence,
    MultiBlock,
    SlowFast,
)
from kdlib.diffusion import DiffusionSpec, as_diffusion
from tests.decoding.diffusion_models import EOS, MASK, SPECS, V, batch, contextual, prompts, tabulated
from tests.tiny import tiny_llama

G, N = 11, 4
STRATEGIES = {
    "quota": LowConfidence(steps=6),
    "confidence": ConfidenceThreshold(threshold=0.5),
    "multi_block": MultiBlock(threshold=0.9),
    "coherent": CoherentContext(strategy=EntropyThreshold(threshold=0.9)),
    "slow_fast": SlowFast(tolerance=0.3),
}


def generate(model: Any, rows: Any, name: str = "full", **options: Any) -> Any:
    chosen = {"spec": SPECS[name], "gen_length": G, "block_length": N, "strategy": ConfidenceThreshold(threshold=0.5)}
    return diffusion_generate(model, **rows, **{**chosen, **options})


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("name", SPECS)
def test_rows_do_not_depend_on_their_batch(name, strategy, temperature):
    model, rows = contextual(SPECS[name]), prompts()
    options = {"strategy": strategy, "temperature": temperature}
    together = generate(model, batch(rows), name, seeds=range(8), **options)
    for i, prompt in enumerate(rows):
        alone = generate(model, batch([prompt]), name, seeds=[i], **options)
        assert torch.equal(together.sequences[i, -G:], alone.sequences[0, -G:])
        assert torch.equal(together.commit_step[i], alone.commit_step[0])
        assert together.forwards[i] == alone.forwards[0] == together.commit_step[i].max()
        assert together.lengths[i] == alone.lengths[0]


def test_prompts_stay_and_every_token_has_its_pass():
    rows = batch(prompts())
    found = generate(contextual(SPECS["full"]), rows, stop_ids=())
    assert torch.equal(found.sequences[:, :-G], rows["input_ids"])
    assert (found.commit_step > 0).all() and (found.lengths == G).all()
    for steps, last in zip(found.commit_step.tolist(), found.forwards.tolist(), strict=True):
        assert set(steps) == set(range(1, last + 1))  # a pass commits at least one
        assert max(steps[:4]) < min(steps[4:8]) and max(steps[4:8]) < min(steps[8:])


def test_mask_is_never_emitted():
    model, _ = tabulated(SPECS["full"])  # its likeliest token is MASK everywhere
    for temperature in (0.0, 1.0):
        found = generate(model, batch(prompts()), stop_ids=(), temperature=temperature, seeds=range(8))
        assert not (found.sequences[:, -G:] == MASK).any()


def test_what_is_behind_the_end_is_filled():
    model, _ = tabulated(SPECS["full"])
    model.lm_head.weight.data[EOS, 3 + 5] = 50.0  # the response's column 5, in its second block
    model.lm_head.weight.data[7, 3 + 9] = 60.0
    rows = {"input_ids": torch.tensor([[3, 4, 5]])}
    everything = EntropyThreshold(threshold=float("inf"))
    found = generate(model, rows, strategy=everything)
    assert found.sequences[0, -G:].tolist()[5:] == [EOS] * 6
    assert found.commit_step[0].tolist() == [1] * 4 + [2] * 2 + [0] * 5
    assert (found.lengths.tolist(), found.forwards.tolist(), found.tokens_per_forward) == ([5], [2], 2.5)

    wide = generate(model, rows, strategy=replace(everything), block_length=G)  # what was committed behind the end, too
    assert wide.sequences[0, -G:].tolist()[5:] == [EOS] * 6
    assert wide.commit_step[0].tolist() == [1] * 6 + [0] * 5

    single = generate(model, rows, strategy=LowConfidence(steps=G))  # tokens before the end are decoded all the same
    assert single.commit_step[0, :6].min() > 0 and single.forwards.tolist() == [6]
    assert generate(model, rows, stop_ids=()).lengths.tolist() == [G]


def test_stop_tokens():
    model, _ = tabulated(SPECS["full"])
    for column, token in ((2, 9), (6, EOS)):
        model.lm_head.weight.data[token, 3 + column] = 50.0
    rows = {"input_ids": torch.tensor([[3, 4, 5]])}
    assert generate(model, rows, stop_ids=(9,)).sequences[0, -G:].tolist()[2:] == [9] + [EOS] * 8  # filled by the spec's end
    bare = {**SPECS["full"].to_json(), "eos_token_id": None}
    found = generate(model, rows, spec=DiffusionSpec.from_json(bare))  # the generation config's
    assert found.lengths.tolist() == [6]


def test_draws_follow_softmax_at_a_temperature():
    model, table = tabulated(SPECS["full"])
    rows = {"input_ids": torch.tensor([[3, 4, 5]] * 400)}
    found = generate(
        model, rows, strategy=EntropyThreshold(threshold=float("inf")), temperature=0.5, seeds=range(400), stop_ids=()
    )
    logits = torch.tensor(table[3 : 3 + G]).clone()
    logits[:, MASK] = -torch.inf
    expected = (logits / 0.5).softmax(-1)
    drawn = torch.nn.functional.one_hot(found.sequences[:, -G:], V).double().mean(0)
    assert (drawn - expected).abs().max() < 4 * 0.5 / 20  # four standard deviations of a mean of 400
    assert len({tuple(row) for row in found.sequences.tolist()}) > 100


def test_confidence_of_a_draw_is_that_at_temperature_1():
    seen: list[Step] = []

    class Watching(ConfidenceThreshold):
        def commits(self, step: Step) -> torch.Tensor:
            seen.append(step)
            chosen = super().commits(step)
            probs = step.logits.softmax(-1).gather(-1, step.tokens[..., None])[..., 0]
            best = probs.masked_fill(~step.masked, -1).argmax(-1, keepdim=True)
            assert torch.equal(chosen, ((probs >= 0.5) & step.masked).scatter(-1, best, True))
            return chosen

    generate(contextual(SPECS["full"]), batch(prompts()), strategy=Watching(threshold=0.5), temperature=2.0, seeds=range(8))
    assert any((step.tokens != step.logits.argmax(-1)).any() for step in seen)


def test_generator_gives_the_seeds():
    model, rows = contextual(SPECS["full"]), batch(prompts())
    first, again, other = (
        generate(model, rows, temperature=1.5, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)


@pytest.mark.parametrize("strategy", [*STRATEGIES.values(), Factor(factor=1.0)], ids=[*STRATEGIES, "factor"])
def test_shifted_model(strategy):
    """A table moved by one position, read with the shift, is the table."""
    plain, _ = tabulated(SPECS["full"], seed=4)
    shifted, _ = tabulated(SPECS["shifted"], seed=4)
    shifted.lm_head.weight.data[:, :-5] = plain.lm_head.weight.data[:, 1:-4]
    for cache in (None, "prefix", "dual", "free"):
        expected = generate(plain, batch(prompts()), "full", strategy=strategy, cache=cache)
        found = generate(shifted, batch(prompts()), "shifted", strategy=strategy, cache=cache)
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(found.commit_step, expected.commit_step)


@pytest.mark.parametrize("block_length", [1, 3, G, 40])
def test_blocks_that_do_not_divide_the_response(block_length):
    everything = EntropyThreshold(threshold=float("inf"))
    found = generate(contextual(SPECS["full"]), batch(prompts()), strategy=everything, block_length=block_length, stop_ids=())
    assert (found.forwards == -(-G // block_length)).all()
    assert found.commit_step[0].tolist() == [c // block_length + 1 for c in range(G)]


def test_a_strategy_that_commits_nothing():
    class Never(Strategy):
        def commits(self, step: Step) -> torch.Tensor:
            return torch.zeros_like(step.masked)

    with pytest.raises(ValueError, match="Never commits no token"):
        generate(contextual(SPECS["full"]), batch(prompts()), strategy=Never())


BAD = {
    "mask": ({"input_ids": torch.tensor([[3, MASK]])}, {}, "prompt 0 holds the mask token 23"),
    "gen_length": (None, {"gen_length": 0}, "gen_length 0"),
    "block_length": (None, {"block_length": 0}, "block_length 0"),
    "temperature": (None, {"temperature": -1.0}, "temperature -1.0"),
    "cache": (None, {"cache": "all"}, "cache 'all'"),
    "context": (None, {"gen_length": 511}, "exceed the model's context of 512"),
    "padding": ({"input_ids": torch.tensor([[3, 4]]), "attention_mask": torch.tensor([[1, 0]])}, {}, "left-padded"),
    "seeds": (None, {"temperature": 1.0, "seeds": [1]}, "2 prompts need as many seeds"),
    "spec": (None, {"spec": DiffusionSpec(mask_token_id=99)}, "outside of"),
    "blocks": (None, {"spec": SPECS["blocks"], "block_length": 5}, "attention has blocks of 4"),
    "canvas": (None, {"spec": DiffusionSpec(mask_token_id=None, attention="canvas", block_length=4)}, "its own generate"),
}


@pytest.mark.parametrize(("rows", "options", "message"), BAD.values(), ids=BAD)
def test_refused(rows, options, message):
    with pytest.raises(ValueError, match=message):
        generate(contextual(SPECS["full"]), rows or {"input_ids": torch.tensor([[3, 4], [5, 6]])}, **options)


def test_a_padded_mask_token_is_no_prompt():
    rows = {"input_ids": torch.tensor([[MASK, 3], [4, 5]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    assert generate(contextual(SPECS["full"]), rows).sequences.shape == (2, 2 + G)


def test_causal_model_is_refused():
    with pytest.raises(ValueError, match="is causal"):
        generate(tiny_llama(V), {"input_ids": torch.tensor([[3]])})


def test_float32_and_the_peft_wrapper():
    model = as_diffusion(tiny_llama(V), SPECS["full"])
    plain = generate(model, batch(prompts()))
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"])).eval()
    assert torch.equal(generate(adapted, batch(prompts())).sequences, plain.sequences)

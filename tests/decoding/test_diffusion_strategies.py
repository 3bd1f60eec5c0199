"""Every strategy commits what an independent decoder in plain Python commits, in the same passes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from kdlib.decoding import diffusion_generate
from kdlib.decoding.diffusion_step import Strategy
from kdlib.decoding.strategies import (
    CoherentContext,
    ConfidenceThreshold,
    EntropyThreshold,
    Factor,
    Guided,
    LowConfidence,
    MultiBlock,
    SlowFast,
    TopKMargin,
)
from tests.decoding import diffusion_oracle as oracle
from tests.decoding.diffusion_models import EOS, SPECS, batch, contextual, offset, probabilities, prompts, reader, tabulated
from tests.tiny import tiny_llama

G, N = 11, 4  # a shorter last block
CASES: dict[str, tuple[Strategy, Callable[[], oracle.Rule], int]] = {
    "low_confidence": (LowConfidence(steps=7), lambda: oracle.quota(7, oracle.largest), 1),
    "low_confidence_few": (LowConfidence(steps=1), lambda: oracle.quota(1, oracle.largest), 1),
    "top_k_margin": (TopKMargin(steps=5), lambda: oracle.quota(5, oracle.margin), 1),
    "confidence": (ConfidenceThreshold(threshold=0.5), lambda: oracle.confident(0.5), 1),
    "entropy": (EntropyThreshold(threshold=1.2), lambda: oracle.certain(1.2), 1),
    "factor": (Factor(factor=1.2), lambda: oracle.factor(1.2), 1),
    "coherent": (
        CoherentContext(strategy=EntropyThreshold(threshold=1.2), history=3),
        lambda: oracle.coherent(oracle.certain(1.2), 3),
        1,
    ),
    "coherent_multi_block": (
        CoherentContext(strategy=MultiBlock(threshold=1.0, add=0.25, activate=0.5, blocks=2), history=2),
        lambda: oracle.coherent(oracle.multi_block(1.0, 0.25, 0.5, 2), 2),
        2,
    ),
    "multi_block": (MultiBlock(threshold=0.9), lambda: oracle.multi_block(0.9, 0.1, 0.95, 4), 4),
    "multi_block_two": (
        MultiBlock(threshold=0.5, add=0.5, activate=0.5, blocks=2),
        lambda: oracle.multi_block(0.5, 0.5, 0.5, 2),
        2,
    ),
    "slow_fast": (
        SlowFast(strategy=ConfidenceThreshold(threshold=0.5), tolerance=0.2),
        lambda: oracle.slow_fast(oracle.confident(0.5), 0.2),
        2,
    ),
    "slow_fast_quota": (
        SlowFast(strategy=LowConfidence(steps=6), tolerance=0.3),
        lambda: oracle.slow_fast(oracle.quota(6, oracle.largest), 0.3),
        2,
    ),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize(("strategy", "rule", "live"), CASES.values(), ids=CASES)
def test_model_with_context(spec, strategy, rule, live):
    for seed in (0, 1):
        model, rows = contextual(spec, seed=seed), prompts(seed)[::3]
        found = diffusion_generate(
            model, **batch(rows), spec=spec, gen_length=G, block_length=N, strategy=strategy, stop_ids=(EOS,)
        )
        for i, prompt in enumerate(rows):
            shared = {"G": G, "n": N, "live": live, "offset": offset(spec, prompt, n=N), "stops": (EOS,), "fill": EOS}
            tokens, when, passes = oracle.decode(reader(model, spec, prompt, G=G), rule(), **shared)
            assert found.sequences[i, -G:].tolist() == tokens
            assert found.commit_step[i].tolist() == when
            assert found.forwards[i] == passes
            assert found.lengths[i] == (tokens.index(EOS) if EOS in tokens else G)


@pytest.mark.parametrize(("strategy", "rule", "live"), CASES.values(), ids=CASES)
def test_random_tables(strategy, rule, live):
    for seed in range(6):
        model, table = tabulated(SPECS["full"], seed=seed)
        found = diffusion_generate(
            model,
            torch.tensor([[3, 4, 5]]),
            spec=SPECS["full"],
            gen_length=30,
            block_length=8,
            strategy=strategy,
            stop_ids=(),
        )
        probs = probabilities(table[3:33])
        tokens, when, passes = oracle.decode(lambda _, probs=probs: probs, rule(), G=30, n=8, live=live)
        assert found.sequences[0, 3:].tolist() == tokens
        assert found.commit_step[0].tolist() == when
        assert found.forwards.tolist() == [passes]


def test_guided():
    spec, guide = SPECS["full"], tiny_llama(23, hidden=16, seed=5).double()  # it has no row for MASK
    for seed in (0, 1, 2):
        model, rows = contextual(spec, seed=seed), prompts(seed)[::3]
        if seed:  # a guide that agrees sometimes: it has the model's own embeddings and head
            guide.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data[:23].clone()
            guide.lm_head.weight.data = model.lm_head.weight.data[:23].clone()
        found = diffusion_generate(
            model, **batch(rows), spec=spec, gen_length=G, block_length=N, strategy=Guided(guide=guide), stop_ids=(EOS,)
        )
        for i, prompt in enumerate(rows):

            @torch.no_grad()
            def guess(text: list[int], prompt: list[int] = prompt) -> int:
                return int(guide(input_ids=torch.tensor([prompt + text])).logits[0, -1].argmax())

            read = reader(model, spec, prompt, G=G)
            tokens, when, passes = oracle.decode(read, oracle.guided(guess), G=G, n=N, stops=(EOS,), fill=EOS)
            assert found.sequences[i, -G:].tolist() == tokens
            assert found.commit_step[i].tolist() == when
            assert found.forwards[i] == found.guide_forwards[i] == passes


def test_a_guide_that_agrees_takes_a_pass_for_each_block():
    model, table = tabulated(SPECS["full"], seed=3)
    causal, _ = tabulated(SPECS["shifted"], seed=3)
    causal.config.is_causal = True
    causal.lm_head.weight.data[:, :-5] = model.lm_head.weight.data[:, 1:-4]  # says at position i what the table has at i + 1
    causal.lm_head.weight.data[23] = 0.0
    found = diffusion_generate(
        model,
        torch.tensor([[3, 4]]),
        spec=SPECS["full"],
        gen_length=12,
        block_length=4,
        strategy=Guided(guide=causal),
        stop_ids=(),
    )
    assert found.forwards.tolist() == found.guide_forwards.tolist() == [3]
    assert found.sequences[0, 2:].tolist() == probabilities(table[2:14]).argmax(-1).tolist()


@pytest.mark.parametrize("name", ["full", "blocks"])
def test_multi_block_of_complete_blocks_is_the_entropy_threshold(name):
    spec = SPECS[name]
    model, rows = contextual(spec), batch(prompts())
    settings = {"spec": spec, "gen_length": G, "block_length": N, "stop_ids": ()}
    plain = diffusion_generate(model, **rows, strategy=EntropyThreshold(threshold=1.0), **settings)
    multi = diffusion_generate(model, **rows, strategy=MultiBlock(threshold=1.0, add=1.0, activate=1.0), **settings)
    assert torch.equal(plain.commit_step, multi.commit_step)
    assert torch.equal(plain.sequences, multi.sequences)


@pytest.mark.parametrize("inner", ["entropy", "confidence"])
def test_wrappers_that_change_nothing(inner):
    spec, strategy = SPECS["full"], CASES[inner][0]
    model, rows = contextual(spec), batch(prompts())
    settings = {"spec": spec, "gen_length": G, "block_length": N, "stop_ids": ()}
    plain = diffusion_generate(model, **rows, strategy=strategy, **settings)
    averaged = diffusion_generate(model, **rows, strategy=CoherentContext(strategy=strategy, history=1), **settings)
    assert torch.equal(plain.commit_step, averaged.commit_step)
    assert torch.equal(plain.sequences, averaged.sequences)


@pytest.mark.parametrize("steps", [3, 5, 8, 12])
def test_quota_takes_as_many_passes_as_asked(steps):
    model = contextual(SPECS["full"])
    for strategy in (LowConfidence(steps=steps), TopKMargin(steps=steps)):
        found = diffusion_generate(
            model, **batch(prompts()), spec=SPECS["full"], gen_length=12, block_length=4, strategy=strategy, stop_ids=()
        )
        assert (found.forwards == steps).all()


@pytest.mark.parametrize(("threshold", "passes"), [(math.inf, 3), (0.0, 11)])
def test_entropy_threshold_ends(threshold, passes):
    found = diffusion_generate(
        contextual(SPECS["full"]),
        **batch(prompts()),
        spec=SPECS["full"],
        gen_length=G,
        block_length=N,
        strategy=EntropyThreshold(threshold=threshold),
        stop_ids=(),
    )
    assert (found.forwards == passes).all()
    assert found.tokens_per_forward == G / passes

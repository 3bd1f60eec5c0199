"""Caches: exact where attention is block-causal, elsewhere what a plain loop over transformers' own cache says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kdlib.decoding import diffusion_generate
from kdlib.decoding.strategies import ConfidenceThreshold, EntropyThreshold, LowConfidence, MultiBlock
from tests.decoding import diffusion_oracle as oracle
from tests.decoding.diffusion_models import EOS, MASK, SPECS, batch, contextual, probabilities, prompts, tabulated

G, N = 11, 4
STRATEGIES = {
    "quota": LowConfidence(steps=6),
    "confidence": ConfidenceThreshold(threshold=0.5),
    "multi_block": MultiBlock(threshold=0.9, add=0.25, blocks=2),
}


def settings(name: str, **options: Any) -> dict[str, Any]:
    return {"spec": SPECS[name], "gen_length": G, "block_length": N, "stop_ids": (EOS,), **options}


def equal(found: Any, expected: Any) -> bool:
    return all(torch.equal(getattr(found, key), getattr(expected, key)) for key in ("sequences", "commit_step", "forwards"))


@pytest.mark.parametrize("cache", ["prefix", "dual", "free", "block"])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("name", ["blocks", "sequence_blocks"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_exact_where_attention_is_block_causal(name, strategy, cache, attention):
    model, rows = contextual(SPECS[name], attn_implementation=attention), batch(prompts())
    plain = diffusion_generate(model, **rows, **settings(name, strategy=strategy))
    assert equal(diffusion_generate(model, **rows, **settings(name, strategy=strategy, cache=cache)), plain)


@pytest.mark.parametrize("cache", ["prefix", "dual", "free"])
@pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.parametrize("name", ["full", "shifted", "sequence_blocks"])
def test_rows_do_not_depend_on_their_batch(name, strategy, cache):
    model, rows = contextual(SPECS[name]), prompts()
    together = diffusion_generate(model, **batch(rows), **settings(name, strategy=strategy, cache=cache))
    for i, prompt in enumerate(rows):
        alone = diffusion_generate(model, torch.tensor([prompt]), **settings(name, strategy=strategy, cache=cache))
        assert torch.equal(together.sequences[i, -G:], alone.sequences[0, -G:])
        assert torch.equal(together.commit_step[i], alone.commit_step[0])
        assert together.forwards[i] == alone.forwards[0]


class Stale:
    """What a row reads with a cache and full attention, by whole columns of transformers' own cache."""

    def __init__(self, model: Any, prompt: list[int], *, cache: str) -> None:
        self.model, self.prompt, self.cache, self.block = model, prompt, cache, -1
        self.past: list[tuple[Any, Any]] = []

    @torch.no_grad()
    def __call__(self, tokens: list[int | None]) -> Any:
        ids = torch.tensor([self.prompt + [MASK if t is None else t for t in tokens]])
        S, L = len(self.prompt), ids.shape[1]
        block = tokens.index(None) // N
        begin, end = S + block * N, min(S + (block + 1) * N, L)
        fresh, self.block = block != self.block, block
        known = [] if fresh and self.cache != "free" else self.past
        start = known[0][0].shape[2] if known else 0
        stop = end if self.cache == "dual" and not fresh else L
        behind: list[tuple[Any, Any]] = []
        if self.cache == "dual" and known:
            behind = [(k[:, :, end:], v[:, :, end:]) for k, v in known]
            known, start = [(k[:, :, :begin], v[:, :, :begin]) for k, v in known], begin
        cache = DynamicCache(
            [(torch.cat([k, a], 2), torch.cat([v, b], 2)) for (k, v), (a, b) in zip(known, behind, strict=True)]
            if behind
            else known or None
        )
        output = self.model(
            input_ids=ids[:, start:stop],
            position_ids=torch.arange(start, stop)[None],
            past_key_values=cache,
            use_cache=True,
        )
        if fresh:
            upto = L if self.cache == "dual" else begin
            self.past = [(layer.keys[:, :, :upto], layer.values[:, :, :upto]) for layer in cache.layers]
        probs = torch.zeros(len(tokens), output.logits.shape[-1]).double().numpy()
        probs[max(start - S, 0) : stop - S] = probabilities(output.logits[0].numpy())[max(S - start, 0) :]
        return probs


@pytest.mark.parametrize("cache", ["prefix", "dual", "free"])
def test_full_attention_reads_what_the_cache_says(cache):
    differs = 0
    for seed in (0, 1):
        model, rows = contextual(SPECS["full"], seed=seed), prompts(seed)
        strategy = ConfidenceThreshold(threshold=0.7)
        found = diffusion_generate(model, **batch(rows), **settings("full", strategy=strategy, cache=cache, stop_ids=()))
        plain = diffusion_generate(model, **batch(rows), **settings("full", strategy=strategy, stop_ids=()))
        differs += int((found.sequences != plain.sequences).any() | (found.commit_step != plain.commit_step).any())
        for i, prompt in enumerate(rows):
            tokens, when, passes = oracle.decode(Stale(model, prompt, cache=cache), oracle.confident(0.7), G=G, n=N)
            assert found.sequences[i, -G:].tolist() == tokens
            assert found.commit_step[i].tolist() == when
            assert found.forwards[i] == passes
    assert differs  # what is kept is an approximation


@pytest.mark.parametrize("name", ["full", "shifted"])
def test_a_pass_at_the_start_of_a_block_is_exact(name):
    whole = EntropyThreshold(threshold=float("inf"))  # one pass a block
    model, rows = contextual(SPECS[name]), batch(prompts())
    plain = diffusion_generate(model, **rows, **settings(name, strategy=whole))
    for cache in ("prefix", "dual"):
        assert equal(diffusion_generate(model, **rows, **settings(name, strategy=whole, cache=cache)), plain)


@pytest.mark.parametrize("cache", ["prefix", "dual", "free"])
def test_a_model_without_context_is_not_approximated(cache):
    model, _ = tabulated(SPECS["full"])
    rows = batch(prompts())
    plain = diffusion_generate(model, **rows, **settings("full", strategy=STRATEGIES["confidence"]))
    assert equal(diffusion_generate(model, **rows, **settings("full", strategy=STRATEGIES["confidence"], cache=cache)), plain)


@pytest.mark.parametrize(
    ("cache", "read"),
    [
        (None, [17] * 6),
        ("prefix", [17, 12, 17, 8, 17, 4]),
        ("dual", [17, 4, 17, 4, 17, 4]),
        ("free", [17, 12, 12, 8, 8, 4]),
        ("block", [9, 4, 8, 4, 8, 4]),
    ],
    ids=["none", "prefix", "dual", "free", "block"],
)
def test_columns_that_are_read(cache, read):
    """A prompt of 5 tokens and 3 blocks of 4, two passes each."""
    name = "blocks" if cache == "block" else "full"
    model, widths = contextual(SPECS[name]), []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    quota = settings(name, strategy=LowConfidence(steps=6), cache=cache, gen_length=12, stop_ids=())
    diffusion_generate(model, torch.tensor([[3, 4, 5, 6, 7]]), **quota)
    assert widths[1:] == read  # the first one checks that the model reads both ways


def test_the_exact_cache_is_for_block_causal_attention():
    with pytest.raises(ValueError, match="block-causal"):
        diffusion_generate(
            contextual(SPECS["full"]), torch.tensor([[3]]), **settings("full", strategy=STRATEGIES["quota"], cache="block")
        )

"""The decoding loop against transformers' generate, and what is drawn against the distribution it should come from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from kdlib.decoding import draw, filtered_log_probs, generate
from kdlib.types import Completion, SamplingParams
from tests.tiny import tiny_llama

V = 96
LENGTHS = (5, 1, 12, 7, 12, 3)
GREEDY = SamplingParams(max_tokens=20, temperature=0.0)
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def prompts_of(lengths: tuple[int, ...] = LENGTHS, *, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, V, (n,), generator=generator).tolist() for n in lengths]


def mistral() -> nn.Module:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)).eval()


def gemma3() -> nn.Module:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=6, sliding_window_pattern=2)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).eval()


MODELS = {
    "llama": lambda: tiny_llama(V),
    "llama, eager": lambda: tiny_llama(V, attn_implementation="eager"),
    "mistral, window 8": mistral,
    "gemma 3, windows of 6": gemma3,
    "gpt2, learned positions": gpt2,
}


def hf_greedy(model: Any, prompt: list[int], *, max_tokens: int, stop_ids: tuple[int, ...]) -> list[int]:
    """transformers' own greedy continuation of one unpadded prompt."""
    model.generation_config.eos_token_id = list(stop_ids) or None
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def next_logits(model: Any, prompt: list[int], ids: list[int]) -> Tensor:
    """Logits [n, V] with which each of ``ids`` was chosen, from one pass over the whole sequence."""
    return model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("batch_size", [None, 4])
def test_greedy_is_transformers_token_for_token(name: str, batch_size: int | None) -> None:
    model, prompts = MODELS[name](), prompts_of()
    free = generate(model, prompts, GREEDY, seeds=range(6), pad_token_id=0, batch_size=batch_size)
    stop_ids = (free[0].ids[2], free[2].ids[9])  # tokens that really come, so that rows end at different steps
    stopped = SamplingParams(max_tokens=20, temperature=0.0, stop_ids=stop_ids)
    for params in (GREEDY, stopped):
        ours = generate(model, prompts, params, seeds=range(6), pad_token_id=0, batch_size=batch_size)
        for prompt, completion in zip(prompts, ours, strict=True):
            assert completion.ids == hf_greedy(model, prompt, max_tokens=20, stop_ids=params.stop_ids)
            assert completion.finish == ("stop" if completion.ids[-1] in params.stop_ids else "length")
            logp = next_logits(model, prompt, completion.ids).log_softmax(-1)
            expected = logp[torch.arange(len(completion.ids)), completion.ids]
            torch.testing.assert_close(torch.tensor(completion.logp), expected, atol=1e-4, rtol=0)
    assert {len(completion.ids) for completion in ours} != {20}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=12),
        SamplingParams(max_tokens=12, temperature=0.7, top_p=0.8),
        SamplingParams(max_tokens=12, temperature=1.3, top_k=5),
        SamplingParams(max_tokens=12, top_k=20, top_p=0.5, stop_ids=tuple(range(3, 12))),
    ],
)
def test_recorded_log_probs_are_those_of_the_distribution_drawn_from(params: SamplingParams) -> None:
    model, prompts = tiny_llama(V), prompts_of()
    for prompt, completion in zip(prompts, generate(model, prompts, params, seeds=range(6), pad_token_id=0), strict=True):
        scores = hf_filtered(next_logits(model, prompt, completion.ids), params)
        expected = scores.log_softmax(-1)[torch.arange(len(completion.ids)), completion.ids]
        torch.testing.assert_close(torch.tensor(completion.logp), expected, atol=1e-4, rtol=0)


def hf_filtered(logits: Tensor, params: SamplingParams) -> Tensor:
    warpers: list[Any] = [TemperatureLogitsWarper(params.temperature)]
    warpers += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    warpers += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    for warp in warpers:
        logits = warp(None, logits)
    return logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (7, 1.0), (0, 0.6), (30, 0.9), (500, 0.999), (1, 1.0), (0, 1e-6)])
def test_filters_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(40, V, generator=torch.Generator().manual_seed(1)) * 3
    params = SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    expected = hf_filtered(logits, params).log_softmax(-1)
    torch.testing.assert_close(filtered_log_probs(logits, params), expected, atol=1e-5, rtol=0)


def test_draws_follow_the_distribution_and_never_leave_its_support() -> None:
    p = torch.tensor([0.0, 0.5, 0.0, 0.3, 0.2, 0.0])
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ids = draw(p.log().expand(len(uniform), -1), uniform)
    torch.testing.assert_close(torch.bincount(ids, minlength=6) / len(ids), p, atol=0.015, rtol=0)
    extremes = draw(p.log().expand(2, -1), torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64))
    assert extremes.tolist() == [1, 4]


def test_a_models_samples_follow_its_distribution() -> None:
    model, prompt = tiny_llama(V), prompts_of((4,))[0]
    params = SamplingParams(max_tokens=1, temperature=0.8, top_k=6)
    drawn = generate(model, [prompt] * 4000, params, seeds=range(4000), pad_token_id=0)
    counts = torch.bincount(torch.tensor([completion.ids[0] for completion in drawn]), minlength=V)
    expected = hf_filtered(next_logits(model, prompt, [0]), params).softmax(-1)[0]
    torch.testing.assert_close(counts / 4000, expected, atol=0.03, rtol=0)


def test_a_row_depends_on_its_own_seed_alone() -> None:
    model, prompts = tiny_llama(V), prompts_of()
    params = SamplingParams(max_tokens=16, stop_ids=tuple(range(3, 10)))
    together = generate(model, prompts, params, seeds=range(6), pad_token_id=0)
    alone = [generate(model, [prompts[i]], params, seeds=[i], pad_token_id=0)[0] for i in range(6)]
    pairs = generate(model, prompts[::-1], params, seeds=range(5, -1, -1), pad_token_id=0, batch_size=2)[::-1]
    assert ids_of(together) == ids_of(alone) == ids_of(pairs)
    assert ids_of(generate(model, prompts, params, seeds=range(6, 12), pad_token_id=0)) != ids_of(together)


def test_samples_of_one_prompt_share_its_prefill_and_nothing_else() -> None:
    model, prompts = tiny_llama(V), prompts_of((5, 9))
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    params = SamplingParams(max_tokens=8)
    shared = generate(model, [prompts[0], prompts[1], prompts[0]], params, seeds=[0, 1, 2], pad_token_id=0)
    hook.remove()
    assert seen[0] == 2 and set(seen[1:]) == {3}
    apart = [generate(model, [prompts[i]], params, seeds=[seed], pad_token_id=0)[0] for seed, i in enumerate((0, 1, 0))]
    assert ids_of(shared) == ids_of(apart)
    assert shared[0].ids != shared[2].ids


def test_ended_rows_leave_the_batch() -> None:
    model, prompts = tiny_llama(V), prompts_of()
    free = generate(model, prompts, GREEDY, seeds=range(6), pad_token_id=0)
    early = tuple({completion.ids[0] for completion in free[:5]} - set(free[5].ids))
    seen: list[int] = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    params = SamplingParams(max_tokens=20, temperature=0.0, stop_ids=early)
    last = generate(model, prompts, params, seeds=range(6), pad_token_id=0)[5]
    assert seen[0] == 6 and max(seen[1:]) < 6
    assert last.ids == free[5].ids


def test_generation_ends_with_the_context() -> None:
    model, prompts = gpt2(), prompts_of((60, 3))
    params = SamplingParams(max_tokens=70, temperature=0.0)
    found = generate(model, prompts, params, seeds=[0, 1], pad_token_id=0)
    assert [len(completion.ids) for completion in found] == [4, 61]
    assert {completion.finish for completion in found} == {"length"}


@pytest.mark.parametrize(("lengths", "message"), [((3, 64), "prompt 1 has 64 tokens"), ((3, 4, 0), "prompt 2 is empty")])
def test_prompts_that_cannot_be_continued_are_named(lengths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(gpt2(), prompts_of(lengths), GREEDY, seeds=range(len(lengths)), pad_token_id=0)


def test_every_prompt_needs_a_seed() -> None:
    with pytest.raises(ValueError, match="6 prompts need as many seeds"):
        generate(tiny_llama(V), prompts_of(), GREEDY, seeds=[0], pad_token_id=0)


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.ids for completion in completions]

"""Rollouts by the model in this process: what is drawn and scored, and that training is left as it was."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from kdlib.samplers import HFSampler, merged_weights
from kdlib.types import Sampler, SamplingParams
from tests.tiny import tiny_llama

V = 96
PROMPTS = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14], [15]]
PARAMS = SamplingParams(max_tokens=8, temperature=0.9, top_p=0.9, stop_ids=(2, 20, 40))


def adapted(*targets: str) -> nn.Module:
    model = get_peft_model(tiny_llama(V), LoraConfig(target_modules=list(targets), r=4, lora_dropout=0.5))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return model


def drawn(sampler: Sampler, params: SamplingParams = PARAMS) -> list[list[int]]:
    return [completion.ids for completion in sampler.generate(PROMPTS, params, seeds=range(4))]


@torch.no_grad()
def plain_scores(model: nn.Module, sequences: list[list[int]]) -> list[list[float]]:
    """From whole logits of one sequence after another."""
    model.eval()
    found = []
    for sequence in sequences:
        logp = model(input_ids=torch.tensor([sequence])).logits[0, :-1].log_softmax(-1)
        found.append(logp[torch.arange(len(sequence) - 1), sequence[1:]].tolist())
    return found


@pytest.mark.parametrize("batch_size", [None, 2])
@pytest.mark.parametrize("chunk", [1, 2**25])
def test_scores_are_those_of_whole_logits(batch_size: int | None, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdlib.samplers.hf._LOGITS_AT_ONCE", chunk)
    model = adapted("q_proj", "down_proj")
    sequences = [*PROMPTS, [3] * 20]
    found = HFSampler(model, pad_token_id=0, batch_size=batch_size).score(sequences)
    for ours, theirs in zip(found, plain_scores(model, sequences), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_training_goes_on_as_before() -> None:
    model = adapted("q_proj").train()
    model.get_base_model().model.layers[0].eval()  # a part that the user froze in evaluation mode
    model.gradient_checkpointing_enable()
    model.get_base_model().config.use_cache = False
    before = [module.training for module in model.modules()]
    evaluated = copy.deepcopy(model).eval()
    sampler = HFSampler(model, pad_token_id=0)
    assert drawn(sampler) == drawn(HFSampler(evaluated, pad_token_id=0))  # no dropout
    sampler.score(PROMPTS)
    assert [module.training for module in model.modules()] == before
    model(input_ids=torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


def test_flags_come_back_after_an_error() -> None:
    model = tiny_llama(V).train()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        HFSampler(model, pad_token_id=0).generate([[1], []], PARAMS, seeds=[0, 1])
    assert all(module.training for module in model.modules())


def test_an_adapter_is_live() -> None:
    model = adapted("q_proj", "up_proj")
    sampler = HFSampler(model, pad_token_id=0)
    with_adapter = drawn(sampler)
    assert with_adapter == drawn(HFSampler(copy.deepcopy(model).merge_and_unload(), pad_token_id=0))
    with model.disable_adapter():
        assert drawn(sampler) != with_adapter


def test_an_own_copy_changes_when_it_is_told() -> None:
    model = adapted("q_proj", "up_proj")
    live, own = HFSampler(model, pad_token_id=0), HFSampler(model, pad_token_id=0, own_copy=True)
    old = plain_scores(model, PROMPTS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    new = plain_scores(model, PROMPTS)
    assert own.score(PROMPTS)[2] == pytest.approx(old[2], abs=1e-5)
    assert live.score(PROMPTS)[2] == pytest.approx(new[2], abs=1e-5)
    own.load(merged_weights(model))
    assert own.score(PROMPTS)[2] == pytest.approx(new[2], abs=1e-4)
    assert max(abs(a - b) for a, b in zip(old[2], new[2], strict=True)) > 0.1
    with pytest.raises(ValueError, match=r"no weight head\.bias"):
        own.load([("head.bias", torch.zeros(1))])


def test_autocast_is_used_and_log_probs_stay_near() -> None:
    model = tiny_llama(V)
    seen = []
    model.model.norm.register_forward_hook(lambda _, args, output: seen.append(model.lm_head(output).dtype))
    sampler = HFSampler(model, pad_token_id=0, autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16))
    completions = sampler.generate(PROMPTS, PARAMS, seeds=range(4))
    assert set(seen) == {torch.bfloat16}
    whole = [prompt + completion.ids for prompt, completion in zip(PROMPTS, completions, strict=True)]
    exact = plain_scores(model, whole)
    for ours, theirs in zip(sampler.score(whole), exact, strict=True):
        assert ours == pytest.approx(theirs, abs=0.3)


def test_a_row_of_nan_is_skipped_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama(V)
    with torch.no_grad():
        model.model.embed_tokens.weight[9] = torch.nan
    with caplog.at_level(logging.WARNING):
        found = HFSampler(model, pad_token_id=0).generate(PROMPTS, PARAMS, seeds=range(4))
    assert [bool(completion.ids) for completion in found] == [True, False, True, True]
    assert "rollout of prompt 1 is skipped" in caplog.text and "NaN" in caplog.text


def test_the_live_student_needs_no_weights() -> None:
    model = tiny_llama(V)
    sampler = HFSampler(model, pad_token_id=0)
    assert sampler.model is model
    sampler.load(iter([]))
    sampler.close()

"""Rollouts by real vLLM, in this process and behind HTTP, against transformers; and whether new weights arrive."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from kdlib.decoding import filtered_log_probs
from kdlib.samplers import (
    HFSampler,
    RolloutConfig,
    ServerSampler,
    StaleEngineError,
    VLLMSampler,
    merged_weights,
    probe_sequences,
    verify_sync,
)
from kdlib.types import Completion, Sampler, SamplingParams
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.vllm

PROMPTS = [[5, 90, 17], [33], [8, 250, 111, 64, 27, 300, 12], [201, 44]]
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


@pytest.fixture(scope="module")
def student(tiny_checkpoint: Path) -> nn.Module:
    """The model that both engines start with."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Iterator[Sampler]:
    config = RolloutConfig(engine="vllm", max_model_len=256, enforce_eager=True)
    sampler = VLLMSampler(tiny_checkpoint, config, dtype="float32", seed=0)
    yield sampler
    sampler.close()


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path, serve: Callable, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sampler]:
    arguments = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
    started = serve(tiny_checkpoint, *arguments, "--logprobs-mode", "processed_logprobs", env={"VLLM_SERVER_DEV_MODE": "1"})
    directory = tmp_path_factory.mktemp("transfer")
    config = RolloutConfig(engine="server", url=f"{started.url}/v1", transfer="files", transfer_dir=str(directory))
    sampler = ServerSampler(config.url or "", config)
    yield sampler
    sampler.close()
    assert len(list(directory.iterdir())) == 1  # the newest weights, and no others


@pytest.fixture(params=["engine", "server"])
def sampler(request: pytest.FixtureRequest, student: nn.Module) -> Sampler:
    """Each engine in turn, with the first weights in it."""
    started: Sampler = request.getfixturevalue(request.param)
    if any(abs(a - b) > 1e-4 for a, b in zip(started.score(PROMPTS)[2], scores(student)[2], strict=True)):
        started.load(merged_weights(student))
    return started


def scores(model: nn.Module) -> list[list[float]]:
    return HFSampler(model, pad_token_id=0).score(PROMPTS)


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [completion.ids for completion in completions]


def apart(a: list[list[float]], b: list[list[float]]) -> float:
    """The largest difference between two lists of scores."""
    return max(abs(x - y) for one, other in zip(a, b, strict=True) for x, y in zip(one, other, strict=True))


@torch.no_grad()
def logits_of(model: nn.Module, prompt: list[int], completion: Completion) -> torch.Tensor:
    """[n, V] with which each token was chosen, from one pass over the whole sequence."""
    return model(input_ids=torch.tensor([prompt + completion.ids])).logits[0, len(prompt) - 1 : -1]


def stepped(model: nn.Module) -> nn.Module:
    """A copy after one optimizer step."""
    model = copy.deepcopy(model).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    ids = torch.tensor([PROMPTS[2]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return model.eval()


def test_more_prompts_than_a_step_reads_are_drawn_with_their_seeds(engine: Sampler) -> None:
    """vLLM's scheduler would read one of the prompts in two parts, which fails on a CPU for a request with a seed."""
    prompts = [[5 + i % 200, *range(20, 60)] for i in range(300)]
    params = SamplingParams(max_tokens=2, temperature=1.0)
    drawn = engine.generate(prompts, params, seeds=range(300))
    alone = engine.generate(prompts[-1:], params, seeds=[299])
    assert len(drawn) == 300 and drawn[-1].ids == alone[0].ids


def test_greedy_rollouts_are_transformers_token_for_token(sampler: Sampler, student: nn.Module) -> None:
    free = HFSampler(student, pad_token_id=0).generate(PROMPTS, GREEDY, seeds=range(4))
    stops = (free[0].ids[5], free[2].ids[11])
    for params in (GREEDY, SamplingParams(max_tokens=24, temperature=0.0, stop_ids=stops)):
        found = sampler.generate(PROMPTS, params, seeds=range(4))
        for prompt, completion in zip(PROMPTS, found, strict=True):
            student.generation_config.eos_token_id = list(params.stop_ids) or None
            ids = torch.tensor([prompt])
            expected = student.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
            assert completion.ids == expected[0, len(prompt) :].tolist()
            assert completion.finish == ("stop" if completion.ids[-1] in params.stop_ids else "length")
            logp = logits_of(student, prompt, completion).log_softmax(-1)
            assert completion.logp == pytest.approx([x[i].item() for x, i in zip(logp, completion.ids, strict=True)], abs=1e-3)
    assert any(completion.finish == "stop" for completion in found)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=24),
        SamplingParams(max_tokens=24, temperature=0.7, top_p=0.8, stop_ids=tuple(range(8, 40))),
        SamplingParams(max_tokens=24, temperature=1.4, top_k=6, top_p=0.9),
    ],
)
def test_sampled_log_probs_are_those_of_the_distribution_drawn_from(
    sampler: Sampler, student: nn.Module, params: SamplingParams
) -> None:
    found = sampler.generate(PROMPTS, params, seeds=range(4))
    for prompt, completion in zip(PROMPTS, found, strict=True):
        logp = filtered_log_probs(logits_of(student, prompt, completion), params)
        assert completion.logp == pytest.approx([x[i].item() for x, i in zip(logp, completion.ids, strict=True)], abs=1e-3)
    assert ids_of(sampler.generate(PROMPTS, params, seeds=range(4))) == ids_of(found)
    assert ids_of(sampler.generate(PROMPTS, params, seeds=range(4, 8))) != ids_of(found)


def test_new_weights_replace_the_old_ones(sampler: Sampler, student: nn.Module) -> None:
    old, new = student, stepped(student)
    assert apart(sampler.score(PROMPTS), scores(old)) < 1e-3
    before = sampler.generate(PROMPTS, GREEDY, seeds=range(4))
    with pytest.raises(StaleEngineError, match="still has old weights"):
        verify_sync(sampler, scores(new), PROMPTS, tolerance=1e-2)
    sampler.load(merged_weights(new))
    assert apart(sampler.score(PROMPTS), scores(new)) < 1e-3
    assert apart(sampler.score(PROMPTS), scores(old)) > 0.1
    probes = probe_sequences(300, seed=3)
    assert verify_sync(sampler, HFSampler(new, pad_token_id=0).score(probes), probes, tolerance=1e-2) < 1e-3
    after = sampler.generate(PROMPTS, GREEDY, seeds=range(4))
    expected = HFSampler(new, pad_token_id=0).generate(PROMPTS, GREEDY, seeds=range(4))
    assert ids_of(after) == ids_of(expected) != ids_of(before)


def test_a_lora_students_merged_weights_arrive(sampler: Sampler, student: nn.Module) -> None:
    lora = LoraConfig(target_modules="all-linear", r=4, modules_to_save=["lm_head"])
    adapted = stepped(stepped(get_peft_model(copy.deepcopy(student), lora)))  # B is 0 until the first step
    sampler.load(merged_weights(adapted))
    assert apart(sampler.score(PROMPTS), scores(adapted)) < 1e-3
    assert apart(scores(adapted), scores(student)) > 0.1


def test_prompts_that_fill_the_context_are_named(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="prompt 1 has 256 tokens"):
        sampler.generate([[5], [6] * 256], GREEDY, seeds=[0, 1])
    found = sampler.generate([[6] * 250], GREEDY, seeds=[0])
    assert len(found[0].ids) == 6 and found[0].finish == "length"


def test_tied_embeddings_on_cpu_are_caught(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    student = tiny_llama(len(tokenizer), hidden=128, tie_word_embeddings=True)
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = RolloutConfig(engine="vllm", max_model_len=256, enforce_eager=True)
    sampler = VLLMSampler(str(tmp_path), config, dtype="float32", seed=0)
    try:
        assert verify_sync(sampler, scores(student), PROMPTS, tolerance=1e-3) < 1e-3
        new = stepped(student)
        sampler.load(merged_weights(new))
        with pytest.raises(StaleEngineError, match="tied"):
            verify_sync(sampler, scores(new), PROMPTS, tolerance=1e-2)
    finally:
        sampler.close()

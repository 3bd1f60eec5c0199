"""Exported drafts in a real vLLM engine: it gives the target's own tokens, and counts what our own loop counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from kdlib.decoding.speculative import SpeculativeOutput, speculative_generate
from kdlib.drafts.export import export_draft, fit_vocabulary
from kdlib.serving.engine import speculative_counters, start_engine, stop_engine
from tests.tiny import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.vllm

PROMPTS = [[5, 90, 17], [33], [8, 250, 111, 64, 27, 300, 12], [201, 44], [70, 71, 72, 73]]
GAMMA, NEW = 3, 48
TOKENS = len(tiny_tokenizer())


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a padded vocabulary, as vLLM on CPU wants it: heads of 32 or wider, embeddings not tied."""
    path = tmp_path_factory.mktemp("models") / "target"
    model = tiny_llama(TOKENS, hidden=128, tie_word_embeddings=False)
    fit_vocabulary(model, TOKENS + 24, tokens=TOKENS)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def exported(target: Path) -> dict[str, Any]:
    """The speculative_config of an exported draft: the target with noise on its weights, and without its padding entries."""
    draft = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    fit_vocabulary(draft, TOKENS, tokens=TOKENS)
    generator = torch.Generator().manual_seed(0)
    for parameter in draft.parameters():
        parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator)
    draft.save_pretrained(target.parent / "noisy")
    tiny_tokenizer().save_pretrained(target.parent / "noisy")
    done = export_draft(
        str(target.parent / "noisy"), target.parent / "exported", target=str(target), num_speculative_tokens=GAMMA
    )
    return done.speculative_config


@pytest.fixture(scope="module")
def engine(target: Path, exported: dict[str, Any]) -> Iterator[Any]:
    started = start_engine(str(target), dtype="float32", max_model_len=128, enforce_eager=True, speculative_config=exported)
    yield started
    stop_engine(started)


def served(engine: Any, prompts: list[list[int]]) -> tuple[list[list[int]], dict[str, Any]]:
    """Greedy tokens of each prompt, and by how much the counters rose."""
    from vllm import SamplingParams

    before = speculative_counters(engine)
    settings = SamplingParams(max_tokens=NEW, temperature=0.0, ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings, use_tqdm=False)
    after = speculative_counters(engine)
    return [list(output.outputs[0].token_ids) for output in outputs], {name: _less(after[name], before[name]) for name in after}


def _less(after: Any, before: Any) -> Any:
    return [a - b for a, b in zip(after, before, strict=True)] if isinstance(after, list) else after - before


def model(path: Path | str) -> nn.Module:
    loaded: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return loaded.eval()


def ours(target: Path, config: dict[str, Any], prompts: list[list[int]]) -> list[SpeculativeOutput]:
    pair = model(target), model(config["model"])
    settings: dict[str, Any] = {"max_new_tokens": NEW, "gamma": GAMMA, "stop_ids": ()}
    return [speculative_generate(*pair, torch.tensor([prompt]), **settings) for prompt in prompts]


def test_the_tokens_are_the_targets_own(engine: Any, target: Path) -> None:
    found, _ = served(engine, PROMPTS)
    alone = model(target)
    for prompt, tokens in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([prompt])
        plain = alone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None)
        assert tokens == plain[0, len(prompt) :].tolist()


def test_the_counters_are_those_of_our_own_loop(engine: Any, target: Path, exported: dict[str, Any]) -> None:
    tokens, counted = served(engine, PROMPTS)
    runs = ours(target, exported, PROMPTS)
    assert tokens == [run.sequences[0, len(prompt) :].tolist() for run, prompt in zip(runs, PROMPTS, strict=True)]
    accepted = sum(run.accepted_per_position.sum(0) for run in runs)
    assert counted["num_drafts"] == sum(int(run.rounds.sum()) for run in runs)
    assert counted["num_draft_tokens"] == sum(int(run.drafted.sum()) for run in runs)
    assert counted["num_accepted_tokens_per_pos"] == accepted.tolist()
    assert counted["num_accepted_tokens"] == int(accepted.sum())
    assert 0.2 < counted["num_accepted_tokens"] / counted["num_draft_tokens"] < 0.9  # neither all nor nothing

"""A real vLLM server measured from outside: its counters against what was sent and against a simulation by transformers."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from kdlib.cli.evaluation.served import run
from kdlib.eval.served import ServedSettings, measure_served
from kdlib.eval.served_report import remarks
from tests.tiny import tiny_llama, tiny_tokenizer
from tests.vllm.servers import ServedModel

pytestmark = pytest.mark.vllm

ENGINE = ("--dtype", "float32", "--enforce-eager", "--max-model-len", "256")
PROMPTS = [f"{'two plus ' * (1 + i % 3)}{i}" for i in range(12)]
GAMMA, TOKENS = 3, 24


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A target of four layers, and the first two of them as its draft."""
    root, tokenizer = tmp_path_factory.mktemp("pair"), tiny_tokenizer()
    for name, layers in (("target", 4), ("draft", 2)):
        model = tiny_llama(len(tokenizer), hidden=128, layers=4, tie_word_embeddings=False)
        model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root / "target", root / "draft"


@pytest.fixture(scope="module")
def speculating(pair: tuple[Path, Path], serve: Callable[..., ServedModel]) -> ServedModel:
    config = {"method": "draft_model", "model": str(pair[1]), "num_speculative_tokens": GAMMA}
    return serve(pair[0], *ENGINE, "--speculative-config", json.dumps(config))


@pytest.fixture(scope="module")
def plain(pair: tuple[Path, Path], serve: Callable[..., ServedModel]) -> ServedModel:
    return serve(pair[0], *ENGINE)


def settings(**changes: Any) -> ServedSettings:
    options = {"concurrency": [1, 4], "max_tokens": TOKENS, "ignore_eos": True, "apply_chat_template": False}
    return ServedSettings(**{**options, **changes})


@torch.no_grad()
def simulated(pair: tuple[Path, Path]) -> tuple[int, list[int]]:
    """(rounds, accepted per position) of greedy speculative decoding of PROMPTS, from plain forward passes."""
    target, draft = (AutoModelForCausalLM.from_pretrained(path) for path in pair)
    tokenizer = AutoTokenizer.from_pretrained(pair[0])
    rounds, accepted = 0, [0] * GAMMA
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        answer = continued(target, ids, TOKENS + GAMMA)
        done = 1  # the prefill's token
        while done < TOKENS:
            proposed = continued(draft, [*ids, *answer[:done]], GAMMA)
            agreed = next((i for i in range(GAMMA) if proposed[i] != answer[done + i]), GAMMA)
            rounds, done = rounds + 1, done + agreed + 1
            for position in range(agreed):
                accepted[position] += 1
    return rounds, accepted


def continued(model: LlamaForCausalLM, ids: list[int], tokens: int) -> list[int]:
    answer: list[int] = []
    for _ in range(tokens):
        answer.append(int(model(input_ids=torch.tensor([[*ids, *answer]])).logits[0, -1].argmax()))
    return answer


def test_counters_are_those_of_what_was_sent_and_of_a_simulation(
    speculating: ServedModel, plain: ServedModel, pair: tuple[Path, Path]
) -> None:
    found = measure_served(speculating.url, PROMPTS, settings=settings(), baseline_server=plain.url)
    assert found["speculates"] and found["num_speculative_tokens"] == GAMMA and not found["baseline"]["speculates"]
    rounds, accepted = simulated(pair)
    for measured in found["runs"]:
        assert measured["completion_tokens"] == measured["server_generation_tokens"] == TOKENS * len(PROMPTS)
        assert measured["unexplained_tokens"] == measured["failed"] == 0
        assert measured["num_draft_tokens"] == GAMMA * measured["num_drafts"]
        assert measured["num_accepted_tokens"] == sum(measured["num_accepted_tokens_per_pos"])
        assert measured["time_per_output_token_ms"]["p50"] > 0
    alone = found["runs"][0]
    assert (alone["num_drafts"], alone["num_accepted_tokens_per_pos"]) == (rounds, accepted) and sum(accepted) > 0
    assert alone["acceptance_length"] == pytest.approx(1 + sum(accepted) / rounds)
    # In a batch the last bits of the logits may differ, and a near tie with them.
    assert found["runs"][1]["acceptance_length"] == pytest.approx(alone["acceptance_length"], abs=0.05)
    for measured in found["baseline"]["runs"]:
        assert measured["completion_tokens"] == TOKENS * len(PROMPTS) and measured["acceptance_length"] is None
    assert all(ratio["tokens_per_second"] > 0 for ratio in found["speedup"])


def test_requests_of_others_are_noticed(speculating: ServedModel, pair: tuple[Path, Path]) -> None:
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            payload = {"model": str(pair[0]), "prompt": "is the sky", "max_tokens": 20, "ignore_eos": True, "temperature": 0}
            requests.post(f"{speculating.url}/v1/completions", json=payload, timeout=60)

    other = threading.Thread(target=ask)
    other.start()
    found = measure_served(speculating.url, PROMPTS, settings=settings(concurrency=[1]))
    stop.set()
    other.join()
    assert found["runs"][0]["unexplained_tokens"] > 0
    assert any("requests that were not ours" in line for line in remarks(found))


def test_the_command_with_and_without_speculation(
    speculating: ServedModel, plain: ServedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"question": prompt}) + "\n" for prompt in PROMPTS))
    words = ["--prompts", str(rows), "--concurrency", "1,4", "--max_tokens", "8", "--output_path", str(tmp_path / "out")]
    assert run(["--server", f"{speculating.url}/v1", "--baseline_server", plain.url, *words]) == 0
    assert "speculation" in capsys.readouterr().out
    assert (tmp_path / "out" / "served_acceptance.html").read_text().count("<svg") == 3
    assert run(["--server", plain.url, *words]) == 0
    assert "does not speculate" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "served_acceptance.json").read_text())["runs"][0]["num_drafts"] is None

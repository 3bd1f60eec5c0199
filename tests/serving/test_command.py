"""The vllm serve lines, read as a shell and vLLM's own options would."""

from __future__ import annotations

import json
import shlex

import pytest

from kdlib.serving import serve_command
from kdlib.serving.command import batched_tokens


def option(line: str, name: str) -> str:
    words = shlex.split(line)
    return words[words.index(name) + 1]


@pytest.mark.parametrize("signal", ["hidden", "topk", "sampled", "generate"])
def test_serves_the_model_on_this_machine_alone(signal: str) -> None:
    line = serve_command("org/a model", signal=signal, port=8123, max_model_len=512)  # type: ignore[arg-type]
    assert shlex.split(line)[:3] == ["vllm", "serve", "org/a model"]
    options = {name: option(line, name) for name in ("--host", "--port", "--max-model-len")}
    assert options == {"--host": "127.0.0.1", "--port": "8123", "--max-model-len": "512"}


def test_hidden_states_come_unpooled_and_not_normalised() -> None:
    line = serve_command("m", signal="hidden")
    assert json.loads(option(line, "--pooler-config")) == {"task": "token_embed", "use_activation": False}
    assert (option(line, "--runner"), option(line, "--convert")) == ("pooling", "embed")


def test_log_probs_are_raw_and_as_many_as_asked() -> None:
    line = serve_command("m", signal="topk", k=100, max_num_batched_tokens=512)
    assert (option(line, "--max-logprobs"), option(line, "--logprobs-mode")) == ("100", "raw_logprobs")
    assert option(line, "--max-num-batched-tokens") == "512" and "--enable-prefix-caching" in shlex.split(line)
    assert option(serve_command("m", signal="sampled", k=100), "--max-logprobs") == "1"


@pytest.mark.parametrize(("vocab_size", "budget"), [(151936, 2**31), (256000, 2**30), (32000, 2**29)])
def test_a_step_of_the_engine_stays_within_the_budget(vocab_size: int, budget: int) -> None:
    tokens = batched_tokens(vocab_size, budget_bytes=budget)
    assert tokens * vocab_size * 4 <= budget < (tokens + 256) * vocab_size * 4

"""The one place that imports vLLM: an engine in this process."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vllm import LLM

# An engine in a process of its own could not be given weights without copying them through shared memory.
_IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB; vLLM would take half of the machine


def start_engine(
    model: str,
    *,
    dtype: str = "auto",
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.9,
    enforce_eager: bool = False,
    seed: int = 0,
    pooling: bool = False,
    max_logprobs: int = 20,
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] = "raw_logprobs",
    max_num_batched_tokens: int | None = None,
    enable_sleep_mode: bool = False,
    enable_prefix_caching: bool = True,
    speculative_config: Mapping[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LLM:
    """A vllm.LLM of the checkpoint ``model`` in this process.

    pooling: answers ``encode`` with every position's last hidden state instead of generating. max_logprobs: the most that a
    request may ask for, -1 for all. logprobs_mode: those of generated tokens before or after temperature and filters.
    max_num_batched_tokens: the most that one step of the engine computes, which bounds its [tokens, V] buffer.
    speculative_config: vLLM's own; with it the engine counts for ``speculative_counters``. Variables of vLLM already set in
    the environment are kept. ValueError when vLLM is not installed.
    """
    prepare_environment()
    try:
        from vllm import LLM
        from vllm.config import PoolerConfig
    except ImportError as error:
        raise ValueError(
            'vLLM is not installed here: pip install "kdlib[vllm]" on a machine with GPUs; docs/serving.md says how without one'
        ) from error
    return LLM(
        model,
        dtype=dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        seed=seed,
        runner="pooling" if pooling else "generate",
        convert="embed" if pooling else "none",
        pooler_config=PoolerConfig(task="token_embed", use_activation=False) if pooling else None,
        max_logprobs=max_logprobs,
        logprobs_mode=logprobs_mode,
        max_num_batched_tokens=max_num_batched_tokens,
        **_scheduling(pooling=pooling, batched_tokens=max_num_batched_tokens),
        enable_sleep_mode=enable_sleep_mode,
        enable_prefix_caching=enable_prefix_caching,
        speculative_config=None if speculative_config is None else dict(speculative_config),
        disable_log_stats=speculative_config is None,
        revision=revision,
        tokenizer_revision=revision,
        trust_remote_code=trust_remote_code,
    )


def _scheduling(*, pooling: bool, batched_tokens: int | None) -> dict[str, bool]:
    """On a CPU vLLM 0.32 ends with an error where a prompt is read in two parts and its request has a seed, as ours have."""
    whole = not torch.cuda.is_available() and not pooling and batched_tokens is None
    return {"enable_chunked_prefill": False} if whole else {}


def prepare_environment() -> None:
    """Sets what vLLM reads from the environment when it is imported; variables that are set already are kept."""
    for name, value in (_IN_PROCESS if torch.cuda.is_available() else _IN_PROCESS | _ON_CPU).items():
        os.environ.setdefault(name, value)


def stop_engine(engine: LLM) -> None:
    """Ends the engine and gives its memory back."""
    engine.llm_engine.engine_core.shutdown()


def speculative_counters(engine: LLM) -> dict[str, int | list[int]]:
    """``num_drafts`` (verify rounds), ``num_draft_tokens``, ``num_accepted_tokens``, ``num_accepted_tokens_per_pos`` [gamma].

    Of an engine started with ``speculative_config``, over all requests of its life: take differences. An accepted position has
    all before it accepted; the token that the target adds to each round is not counted.
    """
    from vllm.v1.metrics.reader import Counter, Vector

    prefix = "vllm:spec_decode_"
    found: dict[str, int | list[int]] = {}
    for metric in engine.get_metrics():
        if metric.name.startswith(prefix):
            assert isinstance(metric, Counter | Vector), metric
            found[metric.name.removeprefix(prefix)] = metric.values if isinstance(metric, Vector) else metric.value
    return found


def last_hidden(engine: LLM, rows: Sequence[list[int]]) -> list[Tensor]:
    """The last hidden states [S, Dt] of every row, after the final norm; of an engine started with ``pooling``."""
    outputs = engine.encode([{"prompt_token_ids": row} for row in rows], pooling_task="token_embed", use_tqdm=False)
    return [output.outputs.data for output in outputs]


def prompt_logprobs(engine: LLM, rows: Sequence[list[int]], *, k: int) -> list[list[dict[int, float] | None] | None]:
    """For every row, {token id: log-prob at temperature 1} of each of its tokens and the k likeliest; None at the first."""
    from vllm import SamplingParams

    settings = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=k, detokenize=False)
    outputs = engine.generate([{"prompt_token_ids": row} for row in rows], settings, use_tqdm=False)
    return [_plain(output.prompt_logprobs) for output in outputs]


def _plain(positions: Sequence[Mapping[int, Any] | None] | None) -> list[dict[int, float] | None] | None:
    if positions is None:
        return None
    return [None if one is None else {token: entry.logprob for token, entry in one.items()} for one in positions]

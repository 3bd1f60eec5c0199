"""The command line of a stock vLLM server for each signal that a teacher can give."""

from __future__ import annotations

import shlex
from typing import Literal

Served = Literal["hidden", "topk", "sampled", "generate"]

_HIDDEN = ("--runner", "pooling", "--convert", "embed")
_POOLER = ("--pooler-config", '{"task":"token_embed","use_activation":false}')
_SMALLEST_STEP, _LARGEST_STEP = 256, 8192  # tokens; vLLM wants room for its 256 sequences, more than 8192 gains nothing


def batched_tokens(vocab_size: int, *, budget_bytes: int) -> int:
    """The most tokens that one step of the engine may compute so that [tokens, V] in float32 stays within ``budget_bytes``."""
    return max(_SMALLEST_STEP, min(_LARGEST_STEP, budget_bytes // (4 * vocab_size) // _SMALLEST_STEP * _SMALLEST_STEP))


def serve_command(
    model: str,
    *,
    signal: Served,
    k: int = 64,
    port: int = 8000,
    max_model_len: int | None = None,
    max_num_batched_tokens: int | None = None,
) -> str:
    """The ``vllm serve`` line for ``model``, bound to this machine.

    ``hidden``: last hidden states by POST /pooling. ``topk`` and ``sampled``: prompt log-probs at temperature 1, ``k`` a token;
    ``max_num_batched_tokens`` (see ``batched_tokens``) bounds the engine's [tokens, V] buffer. ``generate``: completions.
    """
    words = ["vllm", "serve", model, "--host", "127.0.0.1", "--port", str(port)]
    if max_model_len is not None:
        words += ["--max-model-len", str(max_model_len)]
    if signal == "hidden":
        words += [*_HIDDEN, *_POOLER]
    if signal in ("topk", "sampled"):
        most = str(k if signal == "topk" else 1)
        words += ["--max-logprobs", most, "--logprobs-mode", "raw_logprobs", "--enable-prefix-caching"]
        if max_num_batched_tokens is not None:
            words += ["--max-num-batched-tokens", str(max_num_batched_tokens)]
    if signal == "generate":  # the log-probs of what is drawn, after temperature, top_p and top_k
        words += ["--logprobs-mode", "processed_logprobs"]
    return shlex.join(words)

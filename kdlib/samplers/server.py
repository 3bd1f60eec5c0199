"""Rollouts by a vLLM server over HTTP."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import requests
from torch import Tensor

from kdlib.decoding.sampling import check_prompts
from kdlib.samplers.config import RolloutConfig
from kdlib.samplers.outcome import completion, own_log_probs, unusable
from kdlib.serving.client import ServerClient
from kdlib.serving.errors import ServerFailedError
from kdlib.serving.scoring import ServerScorer
from kdlib.serving.transfer import FileTransfer, NCCLTransfer, Transfer
from kdlib.types import Completion, SamplingParams

_REQUESTS_AT_ONCE = 64
_START = "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs"


class ServerSampler:
    """``vllm serve`` at ``url``; it has whatever weights its server has until ``load`` is called.

    With several training processes, one of them calls ``load``.
    """

    def __init__(self, url: str, config: RolloutConfig) -> None:
        self.client = ServerClient(url, timeout=config.timeout, patience=config.patience, concurrency=_REQUESTS_AT_ONCE)
        served = self.client.models(command=_START)[0]
        self.model, self.max_model_len = served.name, served.max_model_len
        self._scorer = ServerScorer(self.client, model=self.model, max_model_len=self.max_model_len)
        self.config = config
        self._transfer: Transfer | None = None  # made when weights are first sent: a teacher's server never gets any
        self._filters_checked = False

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams, *, seeds: Sequence[int]) -> list[Completion]:
        """One completion for each prompt; ValueError for an empty prompt or one that fills the context."""
        if not prompts:
            return []
        context = self.max_model_len or float("inf")
        check_prompts(prompts, context=context)
        if not self._filters_checked and (params.temperature not in (0, 1) or params.top_k or params.top_p < 1):
            self._check_filters(prompts[0])
        payloads = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            room = int(min(params.max_tokens, context - len(prompt)))
            payloads.append(self._payload(prompt, params, seed=seed) | {"max_tokens": room})
        answers = self.client.outcomes("/v1/completions", payloads)
        return [_completion(answer, params, row=row) for row, answer in enumerate(answers)]

    def _payload(self, prompt: list[int], params: SamplingParams, *, seed: int) -> dict[str, Any]:
        """A request whose every setting is given, because servers take defaults from the model's generation_config.json."""
        return {
            "model": self.model,
            "prompt": prompt,
            "seed": seed,
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_k": params.top_k,
            "top_p": params.top_p,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(params.stop_ids),
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }

    def _check_filters(self, prompt: list[int]) -> None:
        """Raises ValueError when the server's log-probs are those before temperature and filters.

        Drawn from the single likeliest token, the log-prob is 0 after the filter, and below 0 before it.
        """
        params = SamplingParams(max_tokens=1, top_k=1)
        response = self.client.post("/v1/completions", self._payload(prompt, params, seed=0))
        logp = response.json()["choices"][0]["logprobs"]["token_logprobs"][0]
        if logp is not None and logp < -1e-6:
            raise ValueError(
                f"the server at {self.client.name} gives log-probs at temperature 1 without filters, not those it draws with: "
                f"start it with `{_START}`"
            )
        self._filters_checked = True

    def score(self, sequences: Sequence[list[int]]) -> list[list[float]]:
        """log q(x_t | x_<t) at temperature 1, S - 1 numbers for a sequence of S tokens."""
        return own_log_probs(self._scorer, sequences)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the server's weights, and makes it forget what was cached for the old ones.

        ValueError for a server that takes no weights, and for transfer nccl on a machine without CUDA.
        """
        if self._transfer is None:
            self._transfer = _transfer(self.client, self.config)
        self._transfer.send(weights)

    def close(self) -> None:
        """Ends the connection over which weights were sent; the server goes on."""
        if self._transfer is not None:
            self._transfer.close()


def _transfer(client: ServerClient, config: RolloutConfig) -> Transfer:
    if config.transfer == "nccl":
        return NCCLTransfer(client, group_port=config.group_port)
    assert config.transfer_dir is not None
    return FileTransfer(client, config.transfer_dir)


def _completion(answer: requests.Response | ServerFailedError, params: SamplingParams, *, row: int) -> Completion:
    if isinstance(answer, ServerFailedError):  # what a server makes of log-probs that are NaN
        return unusable(row, str(answer))
    choice = answer.json()["choices"][0]
    return completion(choice["token_ids"], choice["logprobs"]["token_logprobs"], stop_ids=params.stop_ids, row=row)

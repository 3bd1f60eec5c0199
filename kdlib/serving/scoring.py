"""Given token ids scored by a vLLM server or by an engine in this process: last hidden states, or prompt log-probs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import requests
import torch
from torch import Tensor

from kdlib.serving.client import ServerClient
from kdlib.serving.engine import last_hidden, prompt_logprobs
from kdlib.serving.errors import ServerFailedError

if TYPE_CHECKING:
    from vllm import LLM

_ROWS_PER_REQUEST = 64  # what they are is told in one header, which HTTP clients cut off at 64 KiB
_CLAMPED = -9999.0  # what vLLM's server writes for -inf
_WIRE = {torch.bfloat16: "bfloat16", torch.float16: "float16"}  # everything else travels as float32

Entries = tuple[list[int], list[float]]  # ids and log-probs of one position


@dataclass(frozen=True, kw_only=True)
class Row:
    """A sequence, and the positions whose next-token distribution is asked for.

    For log-probs a token must follow each of them, because the engine speaks about the tokens of the prompt only.
    """

    tokens: list[int]
    wanted: list[int]


@dataclass(frozen=True, kw_only=True)
class BadRow:
    """Stands for an answer that cannot be used."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class Listed:
    """``logp`` and ``ids`` [n, k + 1] of a row's wanted positions: the token that follows, then the k likeliest others.

    -inf marks a gap, where the token that follows is one of the k likeliest; a log-prob that is -inf itself is -9999 here.
    """

    logp: Tensor
    ids: Tensor

    def own(self) -> tuple[Tensor, Tensor]:
        """(log-probs, ids) [n, 1] of the tokens that follow."""
        return _unclamped(self.logp[:, :1]), self.ids[:, :1]

    def likeliest(self) -> tuple[Tensor, Tensor]:
        """(log-probs, ids) [n, k] of the k likeliest tokens, in this order."""
        logp, order = self.logp.topk(self.logp.shape[1] - 1, dim=-1)
        return _unclamped(logp), self.ids.gather(-1, order)


class Scorer(Protocol):
    """What answers: a server or an engine. ``name`` for messages; a row holds ``max_model_len`` tokens at most."""

    name: str
    max_model_len: int | None

    def hidden(self, rows: Sequence[Row], *, dtype: torch.dtype) -> list[Tensor | BadRow]:
        """The last hidden states [n, Dt] of each row's wanted positions."""
        ...

    def logprobs(self, rows: Sequence[Row], *, k: int, temperature: float) -> list[Listed | BadRow]:
        """The log-probs of the token after each wanted position and of the k likeliest."""
        ...


class ServerScorer:
    """The model ``name`` of a server, by POST /pooling and POST /v1/completions."""

    def __init__(self, client: ServerClient, *, model: str, max_model_len: int | None) -> None:
        self.client, self.model, self.max_model_len = client, model, max_model_len
        self.name = client.name

    def hidden(self, rows: Sequence[Row], *, dtype: torch.dtype) -> list[Tensor | BadRow]:
        size = min(_ROWS_PER_REQUEST, -(-len(rows) // self.client.concurrency))
        groups = [rows[start : start + size] for start in range(0, len(rows), size)]
        wire = _WIRE.get(dtype, "float32")
        payloads = [self._pooling([row.tokens for row in group], wire=wire) for group in groups]
        answers = self.client.outcomes("/pooling", payloads)
        return [x for group, answer in zip(groups, answers, strict=True) for x in self._states(group, answer, dtype=dtype)]

    def _pooling(self, tokens: list[list[int]], *, wire: str) -> dict[str, Any]:
        form = {"encoding_format": "bytes", "embed_dtype": wire, "endianness": "little", "use_activation": False}
        return {"model": self.model, "task": "token_embed", "input": tokens, **form}

    def _states(
        self, group: Sequence[Row], answer: requests.Response | ServerFailedError, *, dtype: torch.dtype
    ) -> Iterable[Tensor | BadRow]:
        if isinstance(answer, ServerFailedError):
            if len(group) == 1:
                return [BadRow(reason=str(answer))]
            return [x for row in group for x in self.hidden([row], dtype=dtype)]  # one of them is to blame: which?
        items = sorted(json.loads(answer.headers["metadata"])["data"], key=lambda item: item["index"])
        stored = dtype if dtype in _WIRE else torch.float32
        states = [
            torch.frombuffer(bytearray(answer.content[item["start"] : item["end"]]), dtype=stored).view(item["shape"])
            for item in items
        ]
        return [_finite(x, row) for x, row in zip(states, group, strict=True)]

    def logprobs(self, rows: Sequence[Row], *, k: int, temperature: float) -> list[Listed | BadRow]:
        settings = {"model": self.model, "max_tokens": 1, "prompt_logprobs": k, "temperature": temperature}
        answers = self.client.outcomes("/v1/completions", [{**settings, "prompt": row.tokens} for row in rows])
        return [self._listed(row, answer, k=k) for row, answer in zip(rows, answers, strict=True)]

    def _listed(self, row: Row, answer: requests.Response | ServerFailedError, *, k: int) -> Listed | BadRow:
        if isinstance(answer, ServerFailedError):
            return BadRow(reason=str(answer))
        return _listed(row, answer.json()["choices"][0]["prompt_logprobs"], _json_entries, k=k)


class EngineScorer:
    """A vllm.LLM in this process, made by ``start_engine``."""

    def __init__(self, engine: LLM, *, name: str) -> None:
        self.engine, self.name = engine, name
        self._lock = threading.Lock()  # an engine in this process is driven by one thread at a time
        self.max_model_len: int | None = engine.llm_engine.model_config.max_model_len

    def hidden(self, rows: Sequence[Row], *, dtype: torch.dtype) -> list[Tensor | BadRow]:
        with self._lock:
            states = last_hidden(self.engine, [row.tokens for row in rows])
        return [_finite(x.to(dtype), row) for x, row in zip(states, rows, strict=True)]

    def logprobs(self, rows: Sequence[Row], *, k: int, temperature: float) -> list[Listed | BadRow]:
        with self._lock:
            answers = prompt_logprobs(self.engine, [row.tokens for row in rows], k=k)
        return [_listed(row, answer, _engine_entries, k=k) for row, answer in zip(rows, answers, strict=True)]


def _unclamped(logp: Tensor) -> Tensor:
    return torch.where(logp > _CLAMPED, logp, -torch.inf)


def _finite(states: Tensor, row: Row) -> Tensor | BadRow:
    wanted = states[torch.tensor(row.wanted)]
    return wanted if wanted.isfinite().all() else BadRow(reason="its hidden states are NaN or infinite")


def _json_entries(position: Mapping[str, Mapping[str, Any]]) -> Entries:
    return [int(token) for token in position], [entry["logprob"] for entry in position.values()]


def _engine_entries(position: Mapping[int, float]) -> Entries:
    return list(position), list(position.values())


def _listed(row: Row, answer: Sequence[Any] | None, entries: Callable[[Any], Entries], *, k: int) -> Listed | BadRow:
    """The wanted positions of what the engine says about the prompt: entry t + 1 was predicted at position t."""
    if answer is None or len(answer) != len(row.tokens) or any(answer[t + 1] is None for t in row.wanted):
        return BadRow(reason="the engine gave no log-probs for some of its tokens")
    logp, ids = np.full((len(row.wanted), k + 1), -np.inf), np.zeros((len(row.wanted), k + 1), dtype=np.int64)
    for line, t in enumerate(row.wanted):
        tokens, values = entries(answer[t + 1])
        own = tokens.index(row.tokens[t + 1])
        order = [own, *(i for i in range(len(tokens)) if i != own)]
        ids[line, : len(tokens)], logp[line, : len(tokens)] = (
            np.take(tokens, order),
            np.maximum(np.array(values, dtype=float)[order], _CLAMPED),
        )
    if np.isnan(logp).any() or (logp == np.inf).any():
        return BadRow(reason="its log-probs are NaN or infinite")
    return Listed(logp=torch.from_numpy(logp), ids=torch.from_numpy(ids))

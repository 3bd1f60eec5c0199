"""Requests to a server, so many at a time, and when their tokens came back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import requests

from kdlib.serving.errors import ServerRefusedError
from kdlib.serving.metrics import MeasuredServer

Request = tuple[str, Mapping[str, Any]]  # path, payload


@dataclass(kw_only=True)
class Reply:
    """Tokens of a streamed completion and when they came, in seconds; ``error`` says why it broke off.

    ``first`` is when the first ``first_tokens`` arrived, ``last`` when the last did. With speculation a chunk holds several
    tokens, which is why the server's own count, sent with every chunk, is what counts.
    """

    sent: float
    first: float = 0.0
    last: float = 0.0
    first_tokens: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    error: str | None = None

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds per token after the first chunk; None when there is no more than that."""
        later = self.tokens - self.first_tokens
        return (self.last - self.first) / later if later > 0 else None

    def add(self, usage: Mapping[str, Any]) -> None:
        """A chunk's ``usage``, which counts all tokens so far."""
        now, tokens = time.perf_counter(), int(usage["completion_tokens"])
        self.prompt_tokens = int(usage["prompt_tokens"])
        if tokens > self.tokens:
            if not self.tokens:
                self.first, self.first_tokens = now, tokens
            self.last, self.tokens = now, tokens


@dataclass(frozen=True, kw_only=True)
class Load:
    """All replies of one concurrency, and the seconds from the first request to the last token."""

    concurrency: int
    replies: Sequence[Reply]
    seconds: float

    @property
    def tokens(self) -> int:
        """Of all replies, broken ones included."""
        return sum(reply.tokens for reply in self.replies)

    def as_dict(self) -> dict[str, Any]:
        """Requests, tokens and times by their names in reports; milliseconds over the requests that succeeded."""
        whole = [reply for reply in self.replies if reply.error is None]
        steps = [seconds for reply in whole if (seconds := reply.time_per_output_token) is not None]
        return {
            "concurrency": self.concurrency,
            "requests": len(self.replies),
            "failed": len(self.replies) - len(whole),
            "failures": dict(Counter(reply.error for reply in self.replies if reply.error is not None)),
            "seconds": self.seconds,
            "prompt_tokens": sum(reply.prompt_tokens for reply in whole),
            "completion_tokens": sum(reply.tokens for reply in whole),
            "tokens_per_second": sum(reply.tokens for reply in whole) / self.seconds,
            "time_per_output_token_ms": _percentiles(steps),
            "time_to_first_token_ms": _percentiles([reply.first - reply.sent for reply in whole if reply.tokens]),
        }


def load(server: MeasuredServer, asked: Sequence[Request], *, concurrency: int) -> Load:
    """Sends the requests in their order, the next one as soon as one of ``concurrency`` is done; failed ones are kept.

    ValueError when all of them fail.
    """
    start = time.perf_counter()
    with ThreadPoolExecutor(concurrency) as pool:
        try:
            replies = list(pool.map(lambda request: _reply(server, *request), asked))
        except BaseException:  # Ctrl-C must not wait for the requests that are not sent yet
            pool.shutdown(cancel_futures=True)
            raise
    seconds = time.perf_counter() - start
    if all(reply.error is not None for reply in replies):
        raise ValueError(f"{server.name} answers none of {len(replies)} requests: {replies[0].error}")
    return Load(concurrency=concurrency, replies=replies, seconds=seconds)


def _reply(server: MeasuredServer, path: str, payload: Mapping[str, Any]) -> Reply:
    reply = Reply(sent=time.perf_counter())
    try:
        for usage in _usages(server, path, payload):
            reply.add(usage)
    except (ConnectionError, ServerRefusedError, requests.RequestException) as error:
        reply.error = str(error)
    return reply


def _usages(server: MeasuredServer, path: str, payload: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    streamed = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    for chunk in server.stream(path, {**payload, **streamed}):
        if chunk.get("usage"):
            yield chunk["usage"]


def _percentiles(seconds: Sequence[float]) -> dict[str, float | None]:
    if not seconds:
        return {"p50": None, "p99": None}
    p50, p99 = np.percentile(seconds, [50, 99]) * 1000
    return {"p50": float(p50), "p99": float(p99)}

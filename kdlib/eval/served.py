"""Acceptance and speed of a served model, by its own counters and by the clock of its client."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdlib.eval.served_load import Load, Request, load
from kdlib.serving.errors import ServerRefusedError
from kdlib.serving.metrics import Counters, MeasuredServer

Asked = str | Sequence[Mapping[str, Any]]  # a text, or the messages before the answer

_WARM_UP_TOKENS = 8
_SETTLED_SECONDS = 2.0  # a server counts a step just after it has sent the step's tokens


@dataclass(frozen=True, kw_only=True)
class ServedSettings:
    """How prompts are asked.

    ``ignore_eos``: answers go on to ``max_tokens``. ``apply_chat_template``: the server puts texts into a user turn; None does
    so where it has a template. ``timeout``: seconds that an answer may pause.
    """

    concurrency: Sequence[int] = (1, 8, 32)
    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    ignore_eos: bool = False
    apply_chat_template: bool | None = None
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.concurrency or min(self.concurrency) < 1:
            raise ValueError(f"concurrency is a list of numbers of at least 1, not {list(self.concurrency)}")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens is at least 2, because a first token is never drafted: not {self.max_tokens}")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise ValueError("temperature is at least 0, top_p above 0 and at most 1")


def measure_served(
    server: str, prompts: Sequence[Asked], *, settings: ServedSettings, baseline_server: str | None = None
) -> dict[str, Any]:
    """Every concurrency's acceptance and speed at ``server``, and beside ``baseline_server``, asked in turn; JSON as it is.

    All prompts are asked once before, with a few tokens, so that every concurrency finds caches alike. Raises ValueError for a
    server without vLLM's counters, one that restarts meanwhile, and one that answers no request.
    """
    if not prompts:
        raise ValueError("there are no prompts: give at least one")
    servers = [_Server(url, prompts, settings) for url in (server, baseline_server) if url is not None]
    for one in servers:
        one.warm_up()
    runs = [[one.run(concurrency) for one in servers] for concurrency in settings.concurrency]
    found: dict[str, Any] = {
        **servers[0].facts,
        "prompts": len(prompts),
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "ignore_eos": settings.ignore_eos,
        "runs": [pair[0] for pair in runs],
    }
    if baseline_server is not None:
        found["baseline"] = {**servers[1].facts, "runs": [pair[1] for pair in runs]}
        found |= compared(found["runs"], found["baseline"]["runs"])
    return found


def acceptance(counted: Counters) -> dict[str, Any]:
    """Counters and the rates they give, by vLLM's names; None where nothing was drafted."""
    return {
        "num_drafts": counted.drafts,
        "num_draft_tokens": counted.draft_tokens,
        "num_accepted_tokens": counted.accepted_tokens,
        "num_accepted_tokens_per_pos": list(counted.accepted_per_position),
        "acceptance_length": counted.acceptance_length,
        "acceptance_rate": counted.acceptance_rate,
        "acceptance_rate_per_position": counted.per_position,
    }


def compared(runs: Sequence[Mapping[str, Any]], baseline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Speed over the baseline's at every concurrency (above 1 is faster), and the first concurrency at which it is below 1."""
    ratios = [
        {
            "concurrency": ours["concurrency"],
            "tokens_per_second": ours["tokens_per_second"] / theirs["tokens_per_second"],
            "time_per_output_token_p50": _over(
                theirs["time_per_output_token_ms"]["p50"], ours["time_per_output_token_ms"]["p50"]
            ),
        }
        for ours, theirs in zip(runs, baseline, strict=True)
    ]
    slower = sorted(ratio["concurrency"] for ratio in ratios if ratio["tokens_per_second"] < 1)
    return {"speedup": ratios, "stops_paying_at": slower[0] if slower else None}


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


class _Server:
    """One server, the requests it is sent, and what it says of itself."""

    def __init__(self, url: str, prompts: Sequence[Asked], settings: ServedSettings) -> None:
        self._client = MeasuredServer(url, timeout=settings.timeout, concurrency=max(settings.concurrency))
        self._model = self._client.models(command="vllm serve MODEL")[0]
        counters = self._client.counters()
        self.facts = {
            "server": re.sub("//[^/@]*@", "//", url),  # without the password that a URL may hold
            "model": self._model.root,
            "speculates": counters.drafts is not None,
            "num_speculative_tokens": len(counters.accepted_per_position) or None,
        }
        self._settings = settings
        texts = any(isinstance(prompt, str) for prompt in prompts)
        self._wrap = texts and (self._has_template() if settings.apply_chat_template is None else settings.apply_chat_template)
        self._requests = [self._request(prompt) for prompt in prompts]

    def warm_up(self) -> None:
        """Every prompt once, with a few tokens, all of them counted before a measurement begins."""
        few = min(_WARM_UP_TOKENS, self._settings.max_tokens)
        short = [(path, {**payload, "max_tokens": few}) for path, payload in self._requests]
        before = self._client.counters()
        self._settled(before, load(self._client, short, concurrency=max(self._settings.concurrency)))

    def run(self, concurrency: int) -> dict[str, Any]:
        """All prompts once, ``concurrency`` at a time; ``unexplained_tokens`` is what the server generated for others."""
        before = self._client.counters()
        asked = load(self._client, self._requests, concurrency=concurrency)
        counted = self._settled(before, asked)
        return {
            **asked.as_dict(),
            **acceptance(counted),
            "server_generation_tokens": counted.generation_tokens,
            "unexplained_tokens": counted.generation_tokens - asked.tokens,
        }

    def _settled(self, before: Counters, asked: Load) -> Counters:
        """The difference to ``before`` once the server has counted all tokens that it sent."""
        deadline = time.monotonic() + _SETTLED_SECONDS
        while True:
            counted = self._client.counters().since(before)
            if counted.generation_tokens >= asked.tokens or time.monotonic() > deadline:
                return counted
            time.sleep(0.05)

    def _has_template(self) -> bool:
        try:
            self._client.post(*self._request([{"role": "user", "content": "?"}], max_tokens=1))
        except ServerRefusedError:
            return False
        return True

    def _request(self, prompt: Asked, *, max_tokens: int | None = None) -> Request:
        """Every setting is given, because servers take defaults from the model's generation_config.json."""
        settings = self._settings
        common = {
            "model": self._model.name,
            "max_tokens": settings.max_tokens if max_tokens is None else max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "ignore_eos": settings.ignore_eos,
        }
        if isinstance(prompt, str) and not self._wrap:
            return "/v1/completions", {**common, "prompt": prompt}
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return "/v1/chat/completions", {**common, "messages": messages}

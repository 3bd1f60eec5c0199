"""A vLLM server as it is measured from outside: its Prometheus counters, and completions as they stream in."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from kdlib.serving.client import ServerClient
from kdlib.serving.connection import Payload
from kdlib.serving.errors import ServerRefusedError

_GENERATED, _PREFIX = "vllm:generation_tokens", "vllm:spec_decode_num_"
_DATA, _END = b"data: ", b"[DONE]"


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What a server has counted since it started, or (a difference) in between; summed over its engines.

    ``drafts``: verify rounds that had drafted tokens, over all requests; ``accepted_per_position[i]``: rounds in which the
    drafted token i, and so all before it, was accepted. None and () where the server does not speculate. ``created``: when
    the counters began, 0 where the server does not say.
    """

    generation_tokens: int
    drafts: int | None = None
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_per_position: tuple[int, ...] = ()
    created: float = 0.0

    def since(self, earlier: Counters) -> Counters:
        """What was counted after ``earlier``; ValueError when the counters began again in between."""
        pairs = list(zip(self._all(), earlier._all(), strict=False))
        if (self.drafts is None) != (earlier.drafts is None) or self.created != earlier.created or any(b < a for b, a in pairs):
            raise ValueError("the server's counters began again while it was measured: was it restarted? Measure once more")
        differences = [after - before for after, before in pairs]
        return Counters(
            generation_tokens=differences[0],
            drafts=None if self.drafts is None else differences[1],
            draft_tokens=differences[2],
            accepted_tokens=differences[3],
            accepted_per_position=tuple(differences[4:]),
            created=self.created,
        )

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per verify round that had a draft, the bonus token included: 1 + accepted / drafts. None without rounds."""
        return 1.0 + self.accepted_tokens / self.drafts if self.drafts else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted over drafted tokens; None without any."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else None

    @property
    def per_position(self) -> list[float] | None:
        """How often a round accepts position i and all before it (unconditional); None without rounds."""
        return [accepted / self.drafts for accepted in self.accepted_per_position] if self.drafts else None

    def _all(self) -> list[int]:
        return [
            self.generation_tokens,
            self.drafts or 0,
            self.draft_tokens,
            self.accepted_tokens,
            *self.accepted_per_position,
        ]


def parse_counters(text: str) -> Counters:
    """Counters from a server's /metrics, whatever their labels are; ValueError when they are not those of vLLM."""
    found: dict[str, float] = defaultdict(float)
    positions: dict[int, float] = defaultdict(float)
    try:
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    except ValueError as error:
        raise ValueError(f"/metrics is not in Prometheus' text format: {error}") from error
    for sample in samples:
        name = sample.name.removesuffix("_total")
        if name == f"{_PREFIX}accepted_tokens_per_pos":
            positions[int(sample.labels["position"])] += sample.value
        elif name == f"{_GENERATED}_created":
            found[name] = max(found[name], sample.value)
        else:
            found[name] += sample.value
    if _GENERATED not in found:
        raise ValueError("/metrics has no counters of vLLM's: is this a vLLM server, started without --disable-log-stats?")
    speculates = f"{_PREFIX}drafts" in found
    return Counters(
        generation_tokens=int(found[_GENERATED]),
        drafts=int(found[f"{_PREFIX}drafts"]) if speculates else None,
        draft_tokens=int(found[f"{_PREFIX}draft_tokens"]),
        accepted_tokens=int(found[f"{_PREFIX}accepted_tokens"]),
        accepted_per_position=tuple(int(positions[position]) for position in sorted(positions)),
        created=found[f"{_GENERATED}_created"],
    )


class MeasuredServer(ServerClient):
    """A client of one server that asks nothing twice: what fails is part of what is measured."""

    def __init__(self, url: str, *, timeout: float = 600.0, concurrency: int = 8) -> None:
        super().__init__(url, timeout=timeout, concurrency=concurrency)

    def counters(self) -> Counters:
        """The server's counters now; ValueError where it has none or cannot be reached."""
        try:
            return parse_counters(self.get_text("/metrics"))
        except ConnectionError as error:
            raise ValueError(f"{self.name} gives no /metrics ({error}): is it running?") from error
        except ServerRefusedError as error:
            raise ValueError(f"{self.name} gives no /metrics: {error}") from error

    def stream(self, path: str, payload: Payload) -> Iterator[dict[str, Any]]:
        """The chunks of a streamed completion, each as it arrives.

        ConnectionError when the server goes away, ServerRefusedError for what it declines or gives up.
        """
        with closing(self.lines(path, payload)) as lines:
            yield from _chunks(lines)


def _chunks(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Events of a stream; ServerRefusedError for the one in which a server says that it gives up."""
    for line in lines:
        if line.startswith(_DATA) and line != _DATA + _END:
            chunk = json.loads(line.removeprefix(_DATA))
            if "error" in chunk:
                raise ServerRefusedError(str(chunk["error"]["message"]), status=int(chunk["error"].get("code", 500)))
            yield chunk

"""Does speculative decoding write what the target alone would? Identity when greedy, a z-test when sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kdlib.decoding.sampling import filtered_log_probs
from kdlib.eval.acceptance_expected import response_rows
from kdlib.eval.acceptance_statistics import finite
from kdlib.eval.scoring import ScoredChunk, scored_chunks
from kdlib.types import Head, SamplingParams

Z_LIMIT = 4.0
_FLOAT32_TOLERANCE = 1e-4  # logits of the same prefix in batches of other shapes differ by less
_OUTSIDE_LIMIT = 1e-3  # rounding at the edge of a nucleus puts fewer tokens than this outside


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where a response first leaves the target's: ``gap`` is the top logit there minus that of the lesser of the two tokens."""

    prompt: int
    position: int
    gap: float


@dataclass(frozen=True, kw_only=True)
class GreedyCheck:
    """Token ids against the target's own greedy ones. A gap within ``tolerance`` (logits) is a tie that rounding decides."""

    prompts: int
    identical: int
    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def passed(self) -> bool:
        return all(found.gap <= self.tolerance for found in self.differences)

    @property
    def line(self) -> str:
        said = f"greedy identity: {self.identical} of {self.prompts} prompts identical to greedy decoding's tokens"
        if not self.differences:
            return said
        worst = max(self.differences, key=lambda found: found.gap)
        where = f"prompt {worst.prompt}, token {worst.position}: gap {worst.gap:.2g}"
        if self.passed:
            return f"{said}; the others differ by ties within rounding (largest: {where}, tolerance {self.tolerance:.2g})"
        return f"{said}; FAILED, {where} is more than rounding (tolerance {self.tolerance:.2g}): not lossless"

    def to_json(self) -> dict[str, Any]:
        differences = [{**asdict(found), "gap": finite(found.gap)} for found in self.differences]
        return {"check": "greedy_identity", "passed": self.passed, **asdict(self), "differences": differences}


@dataclass(frozen=True, kw_only=True)
class SamplingCheck:
    """z = sum_t (-log p(y_t) - H_t) / sqrt(sum_t Var_t) under the target's filtered distribution; N(0, 1) when lossless.

    ``excess``: mean of -log p(y_t) - H_t in nats. ``outside``: tokens to which the target gives no probability. Necessary, not
    sufficient: it sees that tokens are too unlikely or too likely, not which.
    """

    tokens: int
    z: float
    excess: float
    outside: int

    @property
    def passed(self) -> bool:
        return abs(self.z) <= Z_LIMIT and self.outside <= _OUTSIDE_LIMIT * self.tokens

    @property
    def line(self) -> str:
        said = f"sampling z-test: z = {self.z:.2f} over {self.tokens:,} tokens ({self.excess:+.4f} nats a token)"
        if self.outside:
            said += f", {self.outside:,} tokens outside the target's top_k/top_p"
        return said if self.passed else f"{said}; FAILED, |z| should be below {Z_LIMIT:g}: the output is not the target's"

    def to_json(self) -> dict[str, Any]:
        return {"check": "sampling_z_test", "passed": self.passed, **asdict(self)}


Check = GreedyCheck | SamplingCheck


@torch.no_grad()
def check_greedy(
    target: Any,
    prompts: Sequence[list[int]],
    *,
    outputs: Sequence[list[int]],
    expected: Sequence[list[int]],
    batch_size: int = 8,
) -> GreedyCheck:
    """``outputs`` of speculative decoding against ``expected``, the target's greedy tokens; the target is in eval mode."""
    places = {
        row: _first_difference(ours, theirs)
        for row, (ours, theirs) in enumerate(zip(outputs, expected, strict=True))
        if ours != theirs
    }
    dtype = next(target.parameters()).dtype
    gaps, scale = _gaps(target, prompts, outputs, expected, places=places, batch_size=batch_size)
    return GreedyCheck(
        prompts=len(prompts),
        identical=len(prompts) - len(places),
        differences=tuple(Difference(prompt=row, position=places[row], gap=gaps[row]) for row in places),
        tolerance=max(_FLOAT32_TOLERANCE, torch.finfo(dtype).eps * scale),
    )


def _first_difference(ours: list[int], theirs: list[int]) -> int:
    shorter = min(len(ours), len(theirs))
    return next((i for i in range(shorter) if ours[i] != theirs[i]), shorter)


def _gaps(
    target: Any,
    prompts: Sequence[list[int]],
    outputs: Sequence[list[int]],
    expected: Sequence[list[int]],
    *,
    places: dict[int, int],
    batch_size: int,
) -> tuple[dict[int, float], float]:
    """({row: gap}, the largest logit seen); infinite where one response ends and the other goes on."""
    both = [row for row, at in places.items() if at < min(len(outputs[row]), len(expected[row]))]
    gaps, scale = dict.fromkeys(places, math.inf), 1.0
    if not both:
        return gaps, scale
    prefixes = [prompts[row] + expected[row][: places[row]] for row in both]
    rows = response_rows(prefixes, [[expected[row][places[row]]] for row in both])
    for chunk in _target_chunks(target, rows, batch_size=batch_size, desc="Differences"):
        for index, logits in zip(chunk.row.tolist(), chunk.logits[0], strict=True):
            row = both[index]
            top = float(logits.max())
            gaps[row] = top - min(float(logits[side[row][places[row]]]) for side in (outputs, expected))
            scale = max(scale, abs(top))
    return gaps, scale


def check_sampling(
    target: Any,
    prompts: Sequence[list[int]],
    *,
    outputs: Sequence[list[int]],
    params: SamplingParams,
    batch_size: int = 8,
) -> SamplingCheck:
    """The z-test of ``outputs`` (Var_t = sum_v p log^2 p - H_t^2); needs temperature > 0, and the target in eval mode."""
    assert params.temperature > 0
    rows = response_rows(prompts, outputs)
    return z_test(_target_chunks(target, rows, batch_size=batch_size, desc="Losslessness"), params)


@torch.no_grad()
def z_test(chunks: Iterable[ScoredChunk], params: SamplingParams) -> SamplingCheck:
    """The z-test of the scored tokens of ``chunks``, whose first logits are the target's."""
    excess = variance = 0.0
    tokens = outside = 0
    for chunk in chunks:
        surprise, entropy, spread = _moments(filtered_log_probs(chunk.logits[0], params), chunk.target)
        inside = surprise.isfinite()
        tokens, outside = tokens + len(inside), outside + int((~inside).sum())
        excess += float((surprise - entropy)[inside].sum())
        variance += float(spread[inside].sum())
    z = excess / math.sqrt(variance) if variance > 0 else 0.0
    return SamplingCheck(tokens=tokens, z=z, excess=excess / max(tokens - outside, 1), outside=outside)


def _moments(logp: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log p(y), entropy and variance of -log p for rows of ``logp`` [n, V]; float64."""
    p = logp.exp()
    finite = logp.masked_fill(p == 0, 0.0)
    entropy, square = -(p * finite).sum(-1).double(), (p * finite.square()).sum(-1).double()
    surprise = -logp.gather(-1, chosen[:, None])[:, 0].double()
    return surprise, entropy, (square - entropy.square()).clamp(min=0.0)


def _target_chunks(target: Any, rows: Any, *, batch_size: int, desc: str) -> Iterable[ScoredChunk]:
    vocab_size = Head.of(target).out_features
    return scored_chunks([target], rows, vocab_size=vocab_size, batch_size=batch_size, desc=desc)

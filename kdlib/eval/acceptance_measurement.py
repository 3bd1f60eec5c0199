"""The parts of the protocol in their order: responses, expected acceptance, speculative decoding, checks, timing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset
from tqdm.auto import tqdm

from kdlib.decoding.sampling import generate
from kdlib.eval.acceptance_empirical import Decoded, Decoding, empirical_acceptance
from kdlib.eval.acceptance_expected import METHODS, DraftSampling, expected_acceptance, response_rows
from kdlib.eval.acceptance_prompts import PromptSet
from kdlib.eval.acceptance_summary import Expected, summarise
from kdlib.eval.acceptance_timing import Timing, measure_timing
from kdlib.eval.losslessness import Check, check_greedy, check_sampling
from kdlib.eval.scoring import ScoredChunk
from kdlib.keys import draw_key

# Token rows -> chunks whose logits are (target's [n, V], draft's [n, V] with -inf for what it cannot propose).
Scorer = Callable[[Dataset], Iterable[ScoredChunk]]


@dataclass(frozen=True, kw_only=True)
class AcceptanceResult:
    """Everything that was measured; ``to_json`` uses vLLM's words.

    ``expected``: for each way of drafting, on responses sampled from the target. ``empirical``: counters of speculative
    decoding, one for each gamma and way; ``checks``: what losslessness said about each of them, () when not asked for.
    ``responses``: the target's, in the order of ``prompts``; given to the next call they are not sampled again.
    """

    settings: dict[str, Any]
    prompts: PromptSet = field(repr=False)
    responses: list[list[int]] = field(repr=False)
    expected: dict[DraftSampling, Expected]
    empirical: tuple[Decoded, ...]
    checks: tuple[Check, ...]
    timing: Timing | None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {
            **self.settings,
            "prompts": len(self.prompts),
            "prompts_left_out": self.prompts.left_out,
            "domains": dict(Counter(domain for domain in self.prompts.domains if domain is not None)),
            "response_tokens": sum(map(len, self.responses)),
            "responses_at_max_new_tokens": sum(len(ids) >= self.settings["max_new_tokens"] for ids in self.responses),
            "expected": {method: found.to_json() for method, found in self.expected.items()},
            "empirical": [found.to_json() for found in self.empirical],
            "timing": None if self.timing is None else self.timing.to_json(),
            "checks": [_of(found) | check.to_json() for found, check in zip(self.empirical, self.checks, strict=False)],
        }


def _of(found: Decoded) -> dict[str, Any]:
    return {name: getattr(found, name) for name in ("num_speculative_tokens", "draft_sample_method")}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A pair, its prompts, and the logits of both."""

    decoding: Decoding
    prompts: PromptSet
    scorer: Scorer

    def run(
        self,
        settings: dict[str, Any],
        *,
        gammas: Sequence[int],
        draft_sampling: Sequence[DraftSampling],
        checks: bool,
        timed: int,
        responses: Sequence[list[int]] | None,
    ) -> AcceptanceResult:
        ways: tuple[DraftSampling, ...] = METHODS if self.decoding.params.temperature > 0 else ("greedy",)
        answered = self.responses() if responses is None else list(responses)
        expected = self.expected(answered, ways)
        empirical = tuple(
            self.empirical(gamma, way, alpha=expected[way].acceptance_rate.value)
            for way in ways
            if way in draft_sampling or (draft_sampling and len(ways) == 1)
            for gamma in gammas
        )
        return AcceptanceResult(
            settings=settings,
            prompts=self.prompts,
            responses=answered,
            expected=expected,
            empirical=empirical,
            checks=tuple(self.check(found, answered) for found in empirical) if checks else (),
            timing=self.timing(empirical, expected, answered, prompts=timed) if timed else None,
        )

    def responses(self) -> list[list[int]]:
        """The target's own, each with a seed that follows from its prompt."""
        d, ids = self.decoding, self.prompts.ids
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        seeds = [draw_key(d.seed, key) for key in self.prompts.keys]
        found: dict[int, list[int]] = {}
        with tqdm(total=len(ids), desc="Sampling from the target", unit="prompt") as bar:
            for start in range(0, len(order), d.batch_size):
                rows = order[start : start + d.batch_size]
                batch = [ids[row] for row in rows]
                completions = generate(
                    d.target, batch, d.params, seeds=[seeds[row] for row in rows], pad_token_id=d.pad_token_id
                )
                found.update((row, one.ids) for row, one in zip(rows, completions, strict=True))
                bar.update(len(rows))
        return [found[row] for row in range(len(ids))]

    def expected(self, responses: Sequence[list[int]], ways: Sequence[DraftSampling]) -> dict[DraftSampling, Expected]:
        d = self.decoding
        values = expected_acceptance(self.scorer(response_rows(self.prompts.ids, responses)), d.params)
        chance = {"resamples": d.resamples, "seed": d.seed}
        return {way: summarise(values, way, domains=self.prompts.domains, **chance) for way in ways}

    def empirical(self, gamma: int, way: DraftSampling, *, alpha: float) -> Decoded:
        prompts = self.prompts
        return empirical_acceptance(self.decoding, prompts.ids, keys=prompts.keys, gamma=gamma, method=way, alpha=alpha)

    def check(self, found: Decoded, responses: Sequence[list[int]]) -> Check:
        d, ids = self.decoding, self.prompts.ids
        if d.params.temperature == 0:
            return check_greedy(d.target, ids, outputs=found.outputs, expected=responses, batch_size=d.batch_size)
        return check_sampling(d.target, ids, outputs=found.outputs, params=d.params, batch_size=d.batch_size)

    def timing(
        self,
        empirical: Sequence[Decoded],
        expected: Mapping[DraftSampling, Expected],
        responses: Sequence[list[int]],
        *,
        prompts: int,
    ) -> Timing:
        """On ``prompts`` of the prompts, evenly spread."""
        every = max(1, len(self.prompts) // prompts)
        chosen = range(0, len(self.prompts), every)[:prompts]
        keys = self.prompts.keys
        return measure_timing(
            self.decoding,
            [self.prompts.ids[row] for row in chosen],
            keys=[keys[row] for row in chosen],
            decoded=empirical,
            alphas={way: found.acceptance_rate.value for way, found in expected.items()},
            response_length=sum(map(len, responses)) / len(responses),
        )

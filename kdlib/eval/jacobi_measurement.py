"""Jacobi decoding of all prompts, beside the model's own greedy tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from kdlib.eval.acceptance_prompts import PromptSet
from kdlib.eval.acceptance_statistics import Estimate, ratio
from kdlib.eval.jacobi_counted import COUNTED
from kdlib.eval.jacobi_decoder import JacobiDecoder, Request
from kdlib.eval.jacobi_statistics import (
    OfBlock,
    Passes,
    Trajectories,
    by_block,
    iterations_per_block,
    trajectory_statistics,
)
from kdlib.eval.jacobi_timing import JacobiTiming, greedy_outputs, measure_jacobi_timing
from kdlib.eval.losslessness import GreedyCheck, check_greedy


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """With the model's greedy tokens: ``identical`` responses, ``common`` of ``tokens`` before each first difference."""

    prompts: int
    identical: int
    tokens: int
    common: int

    @property
    def share(self) -> float:
        return self.common / self.tokens

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "share": self.share}


@dataclass(frozen=True, kw_only=True)
class JacobiResult:
    """Everything that was measured; COUNTED says what each number counts, and so does ``to_json``.

    ``lossless``: whether the decoder promises the model's own greedy tokens; ``check`` is then what became of it. ``agreement``
    and ``check`` are None when not asked for; ``trajectories`` where blocks are not iterated one by one to their fixed point.
    ``outputs``: the new tokens of each prompt.
    """

    settings: dict[str, Any]
    prompts: PromptSet = field(repr=False)
    outputs: list[list[int]] = field(repr=False)
    counts: Passes
    tokens_per_forward: Estimate
    by_block: tuple[OfBlock, ...]
    iterations_per_block: Estimate
    trajectories: Trajectories | None
    lossless: bool
    agreement: Agreement | None
    check: GreedyCheck | None
    timing: JacobiTiming | None

    @property
    def passed(self) -> bool:
        """Whether nothing that was checked failed; a decoder that is not lossless is not checked."""
        return self.check is None or self.check.passed

    def to_json(self) -> dict[str, Any]:
        parts = {name: getattr(self, name) for name in ("trajectories", "agreement", "check", "timing")}
        return {
            **self.settings,
            "prompts": len(self.prompts),
            "prompts_left_out": self.prompts.left_out,
            "new_tokens": int(self.counts.lengths.sum()),
            "passes": int(self.counts.passes.sum()),
            "tokens_per_forward": self.tokens_per_forward.to_json(),
            "by_block": [of.to_json() for of in self.by_block],
            "iterations_per_block": self.iterations_per_block.to_json(),
            "iterations_distribution": [{"iterations": k, "blocks": n} for k, n in self.counts.distribution],
            "lossless": self.lossless,
            **{name: None if part is None else part.to_json() for name, part in parts.items()},
            "passed": self.passed,
            "counted": COUNTED,
        }


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The new tokens of each prompt, their counts, and each block's states where asked for."""

    outputs: list[list[int]]
    counts: Passes
    trajectories: list[list[Tensor]]
    lossless: bool


@dataclass(frozen=True, kw_only=True)
class JacobiMeasurement:
    """A model, how it is decoded, and on which prompts."""

    request: Request
    decoder: JacobiDecoder
    prompts: PromptSet
    resamples: int

    def run(self, settings: dict[str, Any], *, checks: bool, timed: int) -> JacobiResult:
        chance = {"resamples": self.resamples, "seed": self.decoder.seed}
        found = self.decoded()
        greedy = greedy_outputs(self.request, self.prompts.ids) if checks else None
        kept = self.decoder.keeps_trajectories
        return JacobiResult(
            settings=settings,
            prompts=self.prompts,
            outputs=found.outputs,
            counts=found.counts,
            tokens_per_forward=ratio(found.counts.per_prompt, **chance),
            by_block=by_block(found.counts, **chance),
            iterations_per_block=iterations_per_block(found.counts, **chance),
            trajectories=trajectory_statistics(found.trajectories, **chance) if kept else None,
            lossless=found.lossless,
            agreement=None if greedy is None else agreement(found.outputs, greedy),
            check=None if greedy is None or not found.lossless else self.check(found.outputs, greedy),
            timing=self.timing(timed) if timed else None,
        )

    def decoded(self) -> Decoded:
        kept, size = self.decoder.keeps_trajectories, self.decoder.block_size
        lengths, passes = np.zeros((2, len(self.prompts)), np.int64)
        iterations = np.zeros((len(self.prompts), -(-self.request.max_new_tokens // size)), np.int64)
        outputs: list[list[int]] = [[] for _ in range(len(self.prompts))]
        trajectories: list[list[Tensor]] = [[] for _ in range(len(self.prompts))]
        lossless = True
        with tqdm(total=len(self.prompts), desc="Jacobi decoding", unit="prompt") as bar:
            for rows, output in self.request.decode(self.decoder, self.prompts.ids, return_trajectories=kept):
                lossless &= output.lossless
                lengths[rows], passes[rows] = output.lengths.cpu().numpy(), output.passes.cpu().numpy()
                iterations[rows] = output.iterations.cpu().numpy()
                new = output.sequences[:, -self.request.max_new_tokens :].tolist()
                for index, row in enumerate(rows):
                    outputs[row] = new[index][: lengths[row]]
                    trajectories[row] = output.trajectories[index] if output.trajectories is not None else []
                bar.update(len(rows))
        counts = Passes(block_size=size, lengths=lengths, passes=passes, iterations=iterations)
        return Decoded(outputs=outputs, counts=counts, trajectories=trajectories, lossless=lossless)

    def check(self, outputs: list[list[int]], greedy: list[list[int]]) -> GreedyCheck:
        size = self.request.batch_size
        return check_greedy(self.request.model, self.prompts.ids, outputs=outputs, expected=greedy, batch_size=size)

    def timing(self, prompts: int) -> JacobiTiming:
        """On ``prompts`` of the prompts, evenly spread."""
        every = max(1, len(self.prompts) // prompts)
        chosen = self.prompts.ids[::every][:prompts]
        return measure_jacobi_timing(self.request, self.decoder, chosen, resamples=self.resamples, seed=self.decoder.seed)


def agreement(outputs: Sequence[list[int]], greedy: Sequence[list[int]]) -> Agreement:
    pairs = list(zip(outputs, greedy, strict=True))
    return Agreement(
        prompts=len(pairs),
        identical=sum(ours == theirs for ours, theirs in pairs),
        tokens=sum(map(len, greedy)),
        common=sum(_common(ours, theirs) for ours, theirs in pairs),
    )


def _common(ours: list[int], theirs: list[int]) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ours, theirs, strict=False)))

"""Teacher correction of a student's own completions: the first wrong token is the teacher's, the rest the student's again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kdlib.data.rollout_rows import prompt_ids, with_completion
from kdlib.trainers.rollouts import Row
from kdlib.types import Completion, Positions, Sampler, SamplingParams, TeacherSignal

_CHUNK = 512  # rows whose whole distributions are looked at together

Scored = Callable[[list[Row]], tuple[TeacherSignal, Positions]]


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Sequence correction and re-generation.

    In a completion y drawn by the student the first token with p(y_t) < threshold * max_v p(v) becomes argmax_v p(v), and
    the student writes on from there. ``score`` gives the teacher's signal of rows, FULL or TOPK (outside the top k p counts
    as 0). The corrected token has no drawing log-prob. Source: Multi-Granularity Semantic Revision (arXiv
    2407.10068), sequence level; the paper's test for a wrong token is not public, the threshold is ours.
    """

    sampler: Sampler
    params: SamplingParams
    score: Scored
    threshold: float

    def __call__(self, rows: Sequence[Row], completions: Sequence[Completion], seeds: Sequence[int]) -> list[Row]:
        """The rows with corrected completions, in order."""
        drawn = [with_completion(row, c.ids, logp=c.logp) for row, c in zip(rows, completions, strict=True)]
        if not drawn:
            return []
        signal, positions = self.score(drawn)
        best, wrong = self._judged(signal, positions.labels)
        made, again = list(drawn), []
        for i in range(len(drawn)):
            own = (positions.sequence == i).nonzero().flatten()
            errors = wrong[own].nonzero().flatten()
            if len(errors):
                at = int(errors[0])
                kept = [*completions[i].ids[:at], int(best[own[at]])]
                again.append((i, kept, [*completions[i].logp[:at], float("nan")]))
        for (i, kept, logp), rest in zip(again, self._continued(rows, again, seeds), strict=True):
            made[i] = with_completion(rows[i], kept + rest.ids, logp=logp + rest.logp)
        return made

    def _judged(self, signal: TeacherSignal, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The teacher's likeliest token [N], and whether the token that stands there is wrong [N]."""
        best, wrong = [], []
        for start in range(0, len(labels), _CHUNK):
            chunk = slice(start, min(start + _CHUNK, len(labels)))
            p = signal.at(chunk, signal.temperature)
            top, where = p.logp.max(-1, keepdim=True)
            ids = where if p.ids is None else p.ids.gather(-1, where)
            same = torch.arange(p.logp.shape[-1], device=labels.device) if p.ids is None else p.ids
            said = p.logp.masked_fill(same != labels[chunk, None], -torch.inf).amax(-1)
            best.append(ids[:, 0])
            wrong.append(said - top[:, 0] < torch.log(torch.tensor(self.threshold)))
        return torch.cat(best).cpu(), torch.cat(wrong).cpu()

    def _continued(
        self, rows: Sequence[Row], again: list[tuple[int, list[int], Any]], seeds: Sequence[int]
    ) -> list[Completion]:
        """What the student writes after each corrected token; nothing after a stop token or at the limit."""
        made = [Completion(ids=[], logp=[], finish="stop")] * len(again)
        room = [self.params.max_tokens - len(kept) for _, kept, _ in again]
        members = [n for n, (_, kept, _) in enumerate(again) if room[n] > 0 and kept[-1] not in self.params.stop_ids]
        if not members:
            return made
        drawn = self.sampler.generate(
            [prompt_ids(rows[again[n][0]]) + again[n][1] for n in members],
            replace(self.params, max_tokens=max(room[n] for n in members)),
            seeds=[seeds[again[n][0]] ^ 1 for n in members],
        )
        for n, completion in zip(members, drawn, strict=True):
            made[n] = replace(completion, ids=completion.ids[: room[n]], logp=completion.logp[: room[n]])
        return made

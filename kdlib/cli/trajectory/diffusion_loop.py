"""Prompts in, a shard of a diffusion model's trajectories out: answered, judged, and what failed answered again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from kdlib.cli.trajectory.rows import OUTSIDE
from kdlib.data.diffusion import DiffusionWritten, trajectory_row
from kdlib.data.traces import Prompt
from kdlib.decoding import DiffusionDecoder, DiffusionOutput
from kdlib.diffusion import DiffusionSpec
from kdlib.keys import draw_key
from kdlib.verifiers import Verifier, judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdlib.cli.generation.source import Source
    from kdlib.cli.trajectory.diffusion import DiffusionTrajectoriesArguments

MASKED, WRONG, EMPTY = "the mask token in the prompt", "wrong", "an empty answer"
NOT_RIGHT = "none right"  # of the rows that keep all keeps


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a prompt's attempt gave: ``tokens`` up to its end token, if it has one, in ``forwards`` passes."""

    tokens: list[int]
    commit_step: list[int]
    forwards: int
    ended: bool

    @property
    def length(self) -> int:
        """Tokens before the end."""
        return len(self.tokens) - self.ended


@dataclass(frozen=True, kw_only=True)
class Judged:
    """``reason``: why the answer is not kept, None where it is right; ``last``: another attempt would not change that."""

    reason: str | None
    usable: bool = True
    last: bool = False


@dataclass(kw_only=True)
class _Shard:
    """What has come of a shard so far, by the prompt's place in it."""

    kept: dict[int, tuple[Answer, str]] = field(default_factory=dict)
    second: dict[int, Answer] = field(default_factory=dict)  # the first usable answer of a prompt, none of whose is right
    failed: dict[int, str] = field(default_factory=dict)
    attempts: int = 0
    spent: int = 0


@dataclass(kw_only=True)
class Answering:
    """Makes a shard of some prompts."""

    arguments: DiffusionTrajectoriesArguments
    source: Source
    model: PreTrainedModel
    spec: DiffusionSpec
    decoder: DiffusionDecoder
    verifier: Verifier | None

    def __call__(self, prompts: Sequence[Prompt], bar: Any) -> DiffusionWritten:
        """The trajectories of ``prompts``; the bar advances by rows kept or dropped."""
        shard = _Shard()
        shard.failed = {place: reason for place, prompt in enumerate(prompts) if (reason := self._problem(prompt))}
        waiting = [place for place in range(len(prompts)) if place not in shard.failed]
        bar.update(len(shard.failed))
        for attempt, temperature in enumerate(self.arguments.schedule):
            if not waiting:
                break
            waiting = self._attempt(prompts, waiting, shard, attempt=attempt, temperature=temperature, bar=bar)
        bar.update(len(waiting))
        return self._written(prompts, shard)

    def _problem(self, prompt: Prompt) -> str | None:
        """Why a prompt is dropped before it is answered."""
        if max(prompt.ids) >= self.model.get_input_embeddings().weight.shape[0]:
            return OUTSIDE
        return MASKED if self.spec.mask_token_id in prompt.ids else None

    def _attempt(
        self, prompts: Sequence[Prompt], places: list[int], shard: _Shard, *, attempt: int, temperature: float, bar: Any
    ) -> list[int]:
        """Answers the prompts at these places, and returns those to answer again."""
        again = []
        decoder = replace(self.decoder, temperature=temperature, seed=draw_key(self.arguments.seed, attempt))
        for place, answer in self._answers(decoder, prompts, places):
            shard.attempts += 1
            shard.spent += answer.forwards
            judged = self._judged(answer, prompts[place])
            if judged.reason is None:
                shard.kept[place] = answer, f"attempt {attempt + 1} (temperature {temperature:g})"
                bar.update()
                continue
            shard.failed[place] = judged.reason
            if judged.usable:
                shard.second.setdefault(place, answer)
            if judged.last:
                bar.update()
            else:
                again.append(place)
        return sorted(again)

    def _answers(self, decoder: DiffusionDecoder, prompts: Sequence[Prompt], places: list[int]) -> Iterator[tuple[int, Answer]]:
        ids = [prompts[place].ids for place in places]
        size, stops = self.arguments.batch_size, self.source.stop_ids
        for rows, output in decoder.decode(self.model, ids, spec=self.spec, batch_size=size, stop_ids=stops):
            for row, answer in zip(rows, _answers(output, gen_length=decoder.gen_length), strict=True):
                yield places[row], answer

    def _judged(self, answer: Answer, prompt: Prompt) -> Judged:
        if not answer.ended and not self.arguments.keep_unfinished:
            return Judged(reason=f"no end within {self.decoder.gen_length} tokens", usable=False)
        tokenizer = self.source.tokenizer
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if not text.strip():
            return Judged(reason=EMPTY, usable=False)
        if self.verifier is None:
            return Judged(reason=None)
        verdict = judge(self.verifier, text, prompt.row)
        if verdict.correct is None:
            return Judged(reason=f"not judged: {verdict.reason}", last=True)
        return Judged(reason=None if verdict.correct else WRONG)

    def _written(self, prompts: Sequence[Prompt], shard: _Shard) -> DiffusionWritten:
        kept = shard.kept
        if self.arguments.keep == "all":
            kept = {place: (answer, NOT_RIGHT) for place, answer in shard.second.items()} | kept
        places = sorted(kept)
        return DiffusionWritten(
            rows=[self._row(prompts[place], kept[place][0]) for place in places],
            tokens=sum(kept[place][0].length for place in places),
            attempts=shard.attempts,
            spent=shard.spent,
            kept_at=Counter(kept[place][1] for place in places),
            dropped_rows=Counter(reason for place, reason in sorted(shard.failed.items()) if place not in kept),
        )

    def _row(self, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        return trajectory_row(
            prompt.ids,
            answer.tokens,
            commit_step=answer.commit_step,
            block_length=self.decoder.block_length,
            forwards=answer.forwards,
        )


def _answers(output: DiffusionOutput, *, gen_length: int) -> Iterator[Answer]:
    """Each row's response up to its first stop token."""
    responses = output.sequences[:, -gen_length:].tolist()
    columns = (output.commit_step.tolist(), output.forwards.tolist(), output.lengths.tolist())
    for tokens, steps, forwards, length in zip(responses, *columns, strict=True):
        end = min(length + 1, gen_length)
        yield Answer(tokens=tokens[:end], commit_step=steps[:end], forwards=forwards, ended=length < gen_length)


def shown(total: Mapping[str, Any]) -> dict[str, str]:
    """What stands beside the progress bar, of ``DiffusionIndex.summary``."""
    return {"kept": f"{total['rows']:,}", "dropped": f"{sum(total['dropped_rows'].values()):,}"}

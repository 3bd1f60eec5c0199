"""Prompts in, shards of trajectories out: greedy outputs first, then all their blocks iterated together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from kdlib.cli.trajectory.rows import OUTSIDE, chat_format, own_completion
from kdlib.data.traces import Prompt
from kdlib.data.trajectories import BlockTrajectory, Written, encoded_row
from kdlib.decoding.jacobi_states import PackedStates, packed_states
from kdlib.decoding.sampling import context_length
from kdlib.keys import draw_key
from kdlib.types import Sampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kdlib.cli.generation.source import Source
    from kdlib.cli.trajectory.jacobi import JacobiTrajectoriesArguments

NO_OUTPUT, NO_COMPLETION = "nothing usable came from the engine", "the row has no completion that follows its prompt"
NOT_GREEDY, NONE_LEFT = "fixed point is not the greedy output", "no block left"


@dataclass(frozen=True, kw_only=True)
class Text:
    """A prompt with y* behind it, and the data set's own ``reference``."""

    prompt: Prompt
    completion: list[int]
    reference: list[int]

    @property
    def ids(self) -> list[int]:
        return [*self.prompt.ids, *self.completion]


@dataclass(kw_only=True)
class _Shard:
    """What has come of a shard so far; ``rows`` by the prompt's place in it."""

    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    dropped_rows: Counter[str] = field(default_factory=Counter)
    dropped_blocks: Counter[str] = field(default_factory=Counter)

    def written(self) -> Written:
        totals = {name: self.counts[name] for name in ("tokens", "iterations", "forwards", "block_by_block")}
        rows = [self.rows[place] for place in sorted(self.rows)]
        return Written(rows=rows, **totals, dropped_rows=self.dropped_rows, dropped_blocks=self.dropped_blocks)


@dataclass(kw_only=True)
class Tracer:
    """Makes a shard of some prompts; ``sampler`` writes y*, None takes the rows' own completions."""

    arguments: JacobiTrajectoriesArguments
    source: Source
    model: PreTrainedModel
    sampler: Sampler | None

    def __post_init__(self) -> None:
        a = self.arguments
        self._params = a.rollout.params(a.max_completion_length, self.source.stop_ids)
        self._chat = chat_format(a, self.source)
        self._context = min(context_length(self.model), self.source.context or float("inf"))
        self._vocabulary = self.model.get_input_embeddings().weight.shape[0]

    def __call__(self, prompts: Sequence[Prompt], bar: Any) -> Written:
        """The trajectories of ``prompts``; the bar advances by rows iterated or dropped."""
        shard, texts = _Shard(), dict[int, Text]()
        for place, text in enumerate(self._texts(prompts)):
            problem = self._problem(text)
            if problem is None:
                texts[place] = text
            else:
                shard.dropped_rows[problem] += 1
                bar.update()
        places = sorted(texts, key=lambda place: (len(texts[place].completion), len(texts[place].prompt.ids)))
        for start in range(0, len(places), self.arguments.batch_size):
            some = {place: texts[place] for place in places[start : start + self.arguments.batch_size]}
            self._iterate(some, shard)
            bar.update(len(some))
        return shard.written()

    def _texts(self, prompts: Sequence[Prompt]) -> Iterator[Text]:
        """Each prompt with its y*; the stop token stays, an output that was cut has none."""
        a, size = self.arguments, self.arguments.generation_batch_size
        for start in range(0, len(prompts), size):
            some = [self._own(prompt) for prompt in prompts[start : start + size]]
            if self.sampler is None:
                limits = [int(min(a.max_completion_length, self._context - len(text.prompt.ids))) for text in some]
                yield from (replace(text, completion=text.reference[:limit]) for text, limit in zip(some, limits, strict=True))
            else:
                drawn = self.sampler.generate([text.prompt.ids for text in some], self._params, seeds=[0] * len(some))
                yield from (replace(text, completion=one.ids) for text, one in zip(some, drawn, strict=True))

    def _own(self, prompt: Prompt) -> Text:
        return Text(prompt=prompt, completion=[], reference=own_completion(prompt, self._chat))

    def _problem(self, text: Text) -> str | None:
        """Why a row is dropped before it is iterated."""
        most = self.arguments.max_repeat
        if not text.completion:
            return NO_COMPLETION if self.sampler is None else NO_OUTPUT
        if max(text.ids) >= self._vocabulary:
            return OUTSIDE
        if most is not None and max(len(list(run)) for _, run in groupby(text.completion)) >= most:
            return f"one token {most} times in a row"
        return None

    def _iterate(self, texts: dict[int, Text], shard: _Shard) -> None:
        """Adds the rows of some texts to the shard, with what it took."""
        found = self._states(list(texts.values()))
        shard.counts.update(forwards=found.forwards, block_by_block=int(found.iterations.sum()))
        states = found.states.cpu().numpy()
        lengths, iterations, converged = (x.tolist() for x in (found.lengths, found.iterations, found.converged))
        for row, (place, text) in enumerate(texts.items()):
            kept = [number for number, whole in enumerate(converged[row]) if whole]
            shard.dropped_blocks[NOT_GREEDY] += sum(n > 0 for n in lengths[row]) - len(kept)
            if not kept:
                shard.dropped_rows[NONE_LEFT] += 1
                continue
            shard.counts.update(tokens=sum(lengths[row][number] for number in kept))
            shard.counts.update(iterations=sum(iterations[row][number] for number in kept))
            blocks = [_block(states[:, row], number, iterations[row], lengths[row]) for number in kept]
            size = self.arguments.block_size
            shard.rows[place] = encoded_row(
                text.prompt.ids, text.completion, block_size=size, blocks=blocks, reference=text.reference
            )

    def _states(self, texts: Sequence[Text]) -> PackedStates:
        a, device = self.arguments, self.model.device
        ids = [torch.tensor(text.ids) for text in texts]
        return packed_states(
            self.model,
            pad_sequence(ids, batch_first=True).to(device),
            attention_mask=pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device),
            prompt_lengths=torch.tensor([len(text.prompt.ids) for text in texts], device=device),
            block_size=a.block_size,
            init=a.init,
            seeds=[draw_key(a.seed, text.prompt.prompt_id) for text in texts],
        )


def _block(states: np.ndarray, number: int, iterations: list[int], lengths: list[int]) -> BlockTrajectory:
    """A converged block's distinct states: as many as its passes, the last of which only shows that nothing changes."""
    return BlockTrajectory(number=number, states=states[: iterations[number], number, : lengths[number]])


def shown(total: Mapping[str, Any]) -> dict[str, str]:
    """What stands beside the progress bar, of ``TrajectoryIndex.summary``."""
    return {"blocks": f"{total['blocks']:,}", "dropped": f"{sum(total['dropped_blocks'].values()):,}"}

"""Prompts in, verified traces out: batch by batch, each safe on disk before the next."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from kdlib.data.draft import UNSCORED
from kdlib.data.traces import Batch, Prompt, Prompts, Skipped, TraceWriter
from kdlib.data.traces.writer import Trace, append_line, cut_torn_line
from kdlib.keys import draw_key
from kdlib.tokenizers.identity import tokenizer_fingerprint
from kdlib.types import Completion, Sampler
from kdlib.verifiers import Verdict, Verifier, judge

if TYPE_CHECKING:
    from kdlib.cli.generate import GenerateArguments
    from kdlib.cli.generation.source import Source

METRICS_FILE = "metrics.jsonl"
EMPTY, UNUSABLE = "an empty completion", "nothing usable came from the engine"


@dataclass(kw_only=True)
class Generator:
    """Makes a batch of traces from some prompts."""

    arguments: GenerateArguments
    source: Source
    sampler: Sampler
    verifier: Verifier | None

    def __post_init__(self) -> None:
        self._params = self.source.rollout.params(self.arguments.max_completion_length, self.source.stop_ids)
        self._tokenizer_id = tokenizer_fingerprint(self.source.tokenizer)

    def __call__(self, prompts: Sequence[Prompt]) -> Batch:
        """The traces of ``prompts``, in order; identical completions of a prompt become one with their ``count``."""
        n = self.arguments.num_generations
        ids = [prompt.ids for prompt in prompts for _ in range(n)]
        seeds = [draw_key(self.arguments.seed, prompt.prompt_id, i) for prompt in prompts for i in range(n)]
        drawn = self.sampler.generate(ids, self._params, seeds=seeds)
        traces: list[Trace] = []
        skipped: list[Skipped] = []
        for number, prompt in enumerate(prompts):
            known: dict[tuple[int, ...], Trace] = {}
            for generation, completion in enumerate(drawn[number * n : (number + 1) * n]):
                key = tuple(completion.ids)
                if key in known:
                    known[key]["count"] += 1
                    continue
                text = self._text(completion)
                if text.strip():
                    known[key] = self._trace(prompt, completion, generation=generation, text=text)
                else:
                    skipped.append(_skipped(prompt, completion, generation=generation))
            traces += known.values()
        return Batch(traces=traces, skipped=skipped)

    def _text(self, completion: Completion) -> str:
        decoded = self.source.tokenizer.decode(completion.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(decoded)

    def _trace(self, prompt: Prompt, completion: Completion, *, generation: int, text: str) -> Trace:
        """A line of a shard; the labels are the tokens that were drawn, so an answer that was cut has no end to learn."""
        trace: Trace = {
            "prompt_id": prompt.prompt_id,
            "generation": generation,
            "count": 1,
            "prompt": prompt.asked,
            "completion": text,
        }
        if not isinstance(prompt.asked, str):
            trace["messages"] = [*prompt.asked, {"role": "assistant", "content": text}]
        trace |= {
            "input_ids": [*prompt.ids, *completion.ids],
            "labels": [UNSCORED] * len(prompt.ids) + completion.ids,
            "finish": completion.finish,
            "tokens": len(completion.ids),
            "logp_sum": float(sum(completion.logp)),
            "tokenizer": self._tokenizer_id,
        }
        return trace | self._judged(text, prompt.row)

    def _judged(self, text: str, row: Mapping[str, Any]) -> dict[str, Any]:
        if self.verifier is None:
            return {"correct": None}
        verdict: Verdict = judge(self.verifier, text, row)
        answer = row.get(self.arguments.answer_column)
        return {"correct": verdict.correct, "reason": verdict.reason, "answer": "" if answer is None else str(answer)}


def _skipped(prompt: Prompt, completion: Completion, *, generation: int) -> Skipped:
    reason = EMPTY if completion.ids else UNUSABLE
    return Skipped(prompt_id=prompt.prompt_id, generation=generation, reason=reason, tokens=len(completion.ids))


def answer(prompts: Prompts, writer: TraceWriter, generator: Generator) -> None:
    """Writes every missing shard. ServerAwayError when a server does not come back; what is on disk stays good."""
    cut_torn_line(writer.directory / METRICS_FILE)
    there = sum(shard.prompts for shard in writer.index.shards.values())
    with tqdm(total=len(prompts), initial=there, desc="Generating", unit="prompt", smoothing=0) as bar:
        meter = _Meter(bar)
        for shard in writer.missing:
            batches, done = writer.batches(shard), writer.kept(shard)
            bar.update(sum(len(numbers) for numbers in batches[: len(done)]))
            for numbers in batches[len(done) :]:
                started = time.monotonic()
                batch = generator([prompts[number] for number in numbers])
                seconds = time.monotonic() - started
                counts = _counts(batch)
                append_line(
                    writer.directory / METRICS_FILE, {"shard": shard, "prompts": len(numbers), **counts, "seconds": seconds}
                )
                writer.append(shard, batch)
                done.append(batch)
                meter.add(len(numbers), counts, seconds=seconds)
            writer.finish(shard, done)


def _counts(batch: Batch) -> dict[str, int]:
    """Over completions as they were drawn, before identical ones became one."""
    counted = [(trace, trace["count"]) for trace in batch.traces]
    return {
        "completions": sum(n for _, n in counted) + len(batch.skipped),
        "tokens": sum(n * trace["tokens"] for trace, n in counted) + sum(skipped.tokens for skipped in batch.skipped),
        "clipped": sum(n for trace, n in counted if trace["finish"] == "length"),
        "judged": sum(n for trace, n in counted if trace["correct"] is not None),
        "correct": sum(n for trace, n in counted if trace["correct"]),
    }


class _Meter:
    """What this session has seen, behind the progress bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._tokens = self._judged = self._correct = 0
        self._seconds = 0.0

    def add(self, prompts: int, counts: Mapping[str, int], *, seconds: float) -> None:
        self._tokens += counts["tokens"]
        self._judged += counts["judged"]
        self._correct += counts["correct"]
        self._seconds += seconds
        shown = {"tokens/s": f"{self._tokens / max(self._seconds, 1e-9):,.0f}"}
        if self._judged:
            shown["pass_rate"] = f"{self._correct / self._judged:.3f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(prompts)

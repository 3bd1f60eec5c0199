"""The rollout side of a trainer: an engine with the student's weights, and a step's rows with what was drawn for them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors.torch import save

from kdlib.files import write_whole
from kdlib.models import inner
from kdlib.samplers import (
    HFSampler,
    ServerSampler,
    StaleEngineError,
    VLLMSampler,
    merged_weights,
    probe_sequences,
    verify_sync,
)
from kdlib.teachers import HFTeacher, VLLMTeacher, leaves
from kdlib.trainers import turns
from kdlib.trainers.correction import Correction
from kdlib.trainers.lookahead import Lookahead
from kdlib.trainers.rollouts import Correct, RolloutCounts, Rollouts, Row
from kdlib.types import Positions, Sampler, TeacherSignal

Batch = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Weights for the engine, and what the student says about ``probes`` with them (nats); None where nothing is compared."""

    weights: list[tuple[str, torch.Tensor]]
    probes: list[list[int]]
    expected: list[list[float]]


@dataclass(kw_only=True)
class Step:
    """A step's micro-batches with completions, what was counted, and seconds per part."""

    batches: list[Batch]
    counts: RolloutCounts
    seconds: dict[str, float] = field(default_factory=dict)


class OnPolicy:
    """Turns the rows of a step into batches with rollouts; keeps the engine's weights at most ``max_staleness`` steps old.

    Raises ValueError at construction for what cannot work: no end-of-turn token, rows without completions below
    on_policy_fraction 1, an engine that cannot be had.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, args = trainer, trainer.args
        self.collator, self.ahead = trainer.data_collator, args.max_staleness > 0
        model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
        for member in leaves(trainer.teacher):
            if isinstance(member, HFTeacher | VLLMTeacher) and member.tokenizer is not None:
                turns.warn(turns.compare(tokenizer, member.tokenizer, args.chat_template_kwargs or {}))
        generation = inner(model).generation_config
        eos = None if generation is None else generation.eos_token_id
        stops = turns.stop_ids(eos, tokenizer, args.chat_template_kwargs or {})
        self.params = args.rollout.params(args.max_completion_length, stops)
        self.untied = False
        self.student = self._of(model)
        self.sampler = self._sampler(model)
        self.rollouts = Rollouts(
            sampler=self.sampler,
            params=self.params,
            fraction=args.on_policy_fraction,
            seed=args.seed,
            context=self._context(model),
            own=args.rollout_source != "teacher",
            correct=self._correction(),
        )
        self.lookahead: Lookahead[tuple[list[Batch], Snapshot | None], Step] | None = None
        self._synced = -1

    def _sampler(self, model: torch.nn.Module) -> Sampler:
        args, accelerator = self.trainer.args, self.trainer.accelerator
        if args.rollout_source == "teacher":
            return teacher_sampler(self.trainer)
        if args.rollout.engine == "hf":
            return self._of(model, own_copy=True) if self.ahead else self.student
        several = accelerator.num_processes > 1
        if several and self.ahead:
            raise ValueError("max_staleness above 0 with a server needs one training process: set it to 0, or use engine hf")
        if args.rollout.engine == "server":
            return ServerSampler(args.rollout.url, args.rollout)
        if several:
            raise ValueError("rollout.engine vllm runs inside one training process: with several use rollout.engine server")
        # vLLM on CPU packs the output embeddings once and would keep them when tied ones change
        self.untied = not torch.cuda.is_available()
        dtype = str(args.compute_dtype or torch.float32).removeprefix("torch.")
        return VLLMSampler(self._checkpoint(model), args.rollout, dtype=dtype, seed=args.seed)

    def _context(self, model: torch.nn.Module) -> int:
        """Tokens that student, engine and teacher can all read."""
        served = [member.longest_row for member in leaves(self.trainer.teacher) if isinstance(member, VLLMTeacher)]
        limits = [self.trainer.args.rollout.max_model_len, inner(model).config.max_position_embeddings, *served]
        return min(limit for limit in limits if limit is not None)

    def _of(self, model: torch.nn.Module, *, own_copy: bool = False) -> HFSampler:
        return HFSampler(
            model,
            pad_token_id=self.trainer.processing_class.pad_token_id,
            batch_size=self.trainer.args.generation_batch_size,
            own_copy=own_copy,
            autocast=self.trainer.accelerator.autocast,
        )

    def _checkpoint(self, model: torch.nn.Module) -> str:
        """The student as it starts, on disk, for an engine to load its shape from; weights are pushed before each step."""
        path = Path(self.trainer.args.output_dir) / "rollout_engine"
        config = copy.deepcopy(inner(model).config)
        if self.untied:
            config.get_text_config().tie_word_embeddings = config.tie_word_embeddings = False
        config.save_pretrained(path)
        self.trainer.processing_class.save_pretrained(path)
        tensors = {name: tensor.cpu().clone() for name, tensor in merged_weights(model, untied=self.untied)}
        write_whole(path / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        return str(path)

    def _correction(self) -> Correct | None:
        args = self.trainer.args
        if args.rollout_source != "corrected":
            return None
        return Correction(sampler=self.sampler, params=self.params, score=self._scored, threshold=args.correction_threshold)

    def _scored(self, rows: list[Row]) -> tuple[TeacherSignal, Positions]:
        batch = send_to_device(self.collator(rows), self.trainer.accelerator.device)
        positions = self.trainer.positions(batch)["distill"]
        with self.trainer.accelerator.autocast():
            return self.trainer.teacher.signal(batch, positions), positions

    # Steps

    def next(self, pull: Callable[[], list[Batch]], *, step: int) -> Step:
        """The batches of ``step`` (1-based), from what ``pull`` gives; an empty list from it ends the epoch."""
        if not self.ahead:
            snapshot = self._snapshot(step) if self.stale(step) else None
            self._synced = step
            return self._made((pull(), snapshot), step)
        if self.lookahead is None:
            self.lookahead = Lookahead(self._made, depth=self.trainer.args.max_staleness)
        newest = [self._snapshot(step)] if self.stale(step) else []
        self._synced = step

        def pull_with_weights() -> tuple[list[Batch], Snapshot | None] | None:
            batches = pull()
            return (batches, newest.pop() if newest else None) if batches else None

        made, waits = self.lookahead.next(pull_with_weights, step=step)
        made.seconds |= {"wait_rollout": waits.update, "wait_update": waits.rollout}
        return made

    def stale(self, step: int) -> bool:
        """Whether the engine lacks the weights of this step."""
        return self.rollouts.own and self.sampler is not self.student and self._synced != step

    def _made(self, work: tuple[list[Batch], Snapshot | None], step: int) -> Step:
        batches, snapshot = work
        if snapshot is not None:
            self._sync(snapshot)
        start = time.perf_counter()
        sizes = [len(batch["rows"]) for batch in batches]
        drawn = [row for batch in batches for row in batch["rows"]]
        try:
            rows, counts = self._drawn(drawn, snapshot, step)
        except StaleEngineError:  # a server that was restarted meanwhile has the weights it started with
            if snapshot is None or self.trainer.accelerator.num_processes > 1:
                raise
            self._sync(snapshot)
            rows, counts = self._drawn(drawn, snapshot, step)
        made = Step(batches=list(self._collated(iter(rows), sizes)), counts=counts)
        made.seconds["rollout"] = time.perf_counter() - start
        if self.ahead and not self.trainer.teacher_signals.inside_forward:
            self._add_signals(made)
        return made

    def _drawn(self, rows: list[Row], snapshot: Snapshot | None, step: int) -> tuple[list[Row], RolloutCounts]:
        """Rows with completions; StaleEngineError when the engine did not have the snapshot's weights until the end."""
        found = self.rollouts(rows, step=step)
        if snapshot is not None and snapshot.probes:
            self._verify(snapshot)
        return found

    def _collated(self, rows: Iterator[Row], sizes: list[int]) -> Iterator[Batch]:
        for size in sizes:
            yield send_to_device(self.collator([next(rows) for _ in range(size)]), self.trainer.accelerator.device)

    def _add_signals(self, made: Step) -> None:
        start = time.perf_counter()
        made.batches = [{**batch, "positions": self.trainer.positions(batch)} for batch in made.batches]
        made.batches = self.trainer.teacher_signals.all_of(made.batches)
        made.seconds["teacher"] = time.perf_counter() - start

    # Weights

    def _snapshot(self, step: int) -> Snapshot:
        """The student as it is now; its tensors are copied where it goes on changing meanwhile."""
        args = self.trainer.args
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        found = merged_weights(model, untied=self.untied)
        weights = [(name, tensor.clone() if self.ahead else tensor) for name, tensor in found]
        if args.rollout.engine == "hf":  # a copy of the same modules: names and shapes are checked when they are loaded
            return Snapshot(weights=weights, probes=[], expected=[])
        probes = probe_sequences(self.trainer.vocab_size, seed=args.seed + step)
        return Snapshot(weights=weights, probes=probes, expected=self.student.score(probes))

    def _sync(self, snapshot: Snapshot) -> None:
        """Loads the weights and compares the engine's log-probs with the student's; a server is given them by one process."""
        accelerator = self.trainer.accelerator
        if accelerator.is_main_process or self.trainer.args.rollout.engine != "server":
            self.sampler.load(iter(snapshot.weights))
            self._verify(snapshot)
        if not self.ahead:
            accelerator.wait_for_everyone()

    def _verify(self, snapshot: Snapshot) -> None:
        if snapshot.probes:
            args = self.trainer.args
            tolerance = args.rollout.sync_tolerance or (0.01 if args.compute_dtype is None else 0.2)
            verify_sync(self.sampler, snapshot.expected, snapshot.probes, tolerance=tolerance)

    def clear(self) -> None:
        """Forgets rollouts made ahead."""
        if self.lookahead is not None:
            self.lookahead.clear()
        self._synced = -1

    def close(self) -> None:
        if self.lookahead is not None:
            self.lookahead.close()
        if self.sampler is not self.student:
            self.sampler.close()


def teacher_sampler(trainer: Any) -> Sampler:
    """The teacher as a writer: its own model in this process, or the server at ``rollout.url``."""
    args, teacher = trainer.args, trainer.teacher
    if args.rollout.engine == "server":
        return ServerSampler(args.rollout.url, args.rollout)
    if isinstance(teacher, HFTeacher):
        pad = trainer.processing_class.pad_token_id
        return HFSampler(teacher.model, pad_token_id=pad, batch_size=args.generation_batch_size)
    raise ValueError(
        f"rollout_source teacher: {type(teacher).__name__} writes nothing; add rollout.engine server and rollout.url, "
        "or run kdlib generate first and train on what it wrote"
    )

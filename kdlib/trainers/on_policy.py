"""The rollout side of a trainer: a step's rows become batches with what was drawn for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device

from kdlib.models import inner
from kdlib.objectives import RowObjective
from kdlib.samplers import StaleEngineError
from kdlib.teachers import HFTeacher, VLLMTeacher, leaves
from kdlib.trainers import turns
from kdlib.trainers.correction import Correction
from kdlib.trainers.engine import Engine
from kdlib.trainers.lookahead import Lookahead
from kdlib.trainers.mixture import mixture_of
from kdlib.trainers.rollout_log import RolloutLog
from kdlib.trainers.rollouts import Correct, RolloutCounts, Rollouts, Row
from kdlib.trainers.snapshot import Snapshot
from kdlib.types import Positions, TeacherSignal

Batch = dict[str, Any]
Work = tuple[list[Batch], Snapshot | None]
WEIGHTS_FILE = "rollout_weights.safetensors"


@dataclass(kw_only=True)
class Step:
    """A step's micro-batches with completions, what was counted, and seconds per part."""

    batches: list[Batch]
    counts: RolloutCounts
    seconds: dict[str, float] = field(default_factory=dict)


class OnPolicy:
    """Turns the rows of a step into batches with rollouts, drawn with weights of the last ``rollout_refresh_steps`` steps.

    With ``max_staleness`` they are that many steps older. ``mixture`` says how many of a step's rows get one, where that is to
    follow the student's entropy.

    Raises ValueError at construction for what cannot work: no end-of-turn token, an engine that cannot be had.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, args = trainer, trainer.args
        self.collator, self.ahead = trainer.data_collator, args.max_staleness > 0
        model = trainer.accelerator.unwrap_model(trainer.model)
        self.mixture = mixture_of(args)
        params = args.rollout.params(args.max_completion_length, self._stop_ids(model))
        self.params = replace(params, log_probs=self._keeps_log_probs())
        self.engine = Engine(trainer, ahead=self.ahead)
        self.rollouts = Rollouts(
            sampler=self.engine.sampler,
            params=self.params,
            fraction=args.on_policy_fraction,
            seed=args.seed,
            context=self._context(model),
            own=args.rollout_source != "teacher",
            correct=self._correction(),
        )
        self.log = RolloutLog(args.output_dir, trainer.processing_class, limit=args.max_completion_length)
        self._lookahead: Lookahead[Work, Step] | None = None
        self._newest: Snapshot | None = None  # what rollouts are to be drawn with, until nothing needs it any more
        self._taken, self._held = -1, -1  # the step of the newest snapshot, and of the one that the engine has

    def _stop_ids(self, model: torch.nn.Module) -> tuple[int, ...]:
        """What ends a completion; student and teacher are compared in it, and in their thinking mode."""
        tokenizer, template = self.trainer.processing_class, self.trainer.args.chat_template_kwargs or {}
        for member in () if self.trainer.aligns_rows else leaves(self.trainer.teacher):
            if isinstance(member, HFTeacher | VLLMTeacher) and member.tokenizer is not None:
                turns.warn(turns.compare(tokenizer, member.tokenizer, template))
        generation = inner(model).generation_config
        return turns.stop_ids(None if generation is None else generation.eos_token_id, tokenizer, template)

    def _keeps_log_probs(self) -> bool:
        """Whether anything may read what completions were drawn with; what is not a RowObjective is not known to leave it."""
        objective = self.trainer.objective
        return self.ahead or self.mixture is not None or not isinstance(objective, RowObjective) or objective.reads_drawn

    def _context(self, model: torch.nn.Module) -> int:
        """Tokens that student, engine and teacher can all read."""
        served = [member.longest_row for member in leaves(self.trainer.teacher) if isinstance(member, VLLMTeacher)]
        limits = [self.trainer.args.rollout.max_model_len, inner(model).config.max_position_embeddings, *served]
        return min(limit for limit in limits if limit is not None)

    def _correction(self) -> Correct | None:
        args = self.trainer.args
        if args.rollout_source != "corrected":
            return None
        return Correction(
            sampler=self.engine.sampler, params=self.params, score=self._scored, threshold=args.correction_threshold
        )

    def _scored(self, rows: list[Row]) -> tuple[TeacherSignal, Positions]:
        batch = send_to_device(self.collator(rows), self.trainer.accelerator.device)
        positions = self.trainer.positions(batch)["distill"]
        with self.trainer.accelerator.autocast():
            return self.trainer.teacher.signal(batch, positions), positions

    def next(self, pull: Callable[[], list[Batch]], *, step: int) -> Step:
        """The batches of ``step`` (1-based), from what ``pull`` gives; an empty list from it ends the epoch."""
        if self.mixture is not None:
            self.rollouts = replace(self.rollouts, fraction=self.mixture.share)
        if self._due(step):
            self._newest, self._taken = self.engine.snapshot(step), step
        if not self.ahead:
            return self._made((pull(), self._weights()), step)
        if self._lookahead is None:
            self._lookahead = Lookahead(self._made, depth=self.trainer.args.max_staleness)

        def pull_with_weights() -> Work | None:
            batches = pull()
            return (batches, self._weights()) if batches else None

        made, waits = self._lookahead.next(pull_with_weights, step=step)
        made.seconds |= {"wait_rollout": waits.update, "wait_update": waits.rollout}
        return made

    def _due(self, step: int) -> bool:
        """Whether the engine's weights are renewed before ``step``: at the first, and at every refresh."""
        if not self.engine.has_own_weights or self._taken == step:
            return False
        return self._taken < 0 or (step - 1) % self.trainer.args.rollout_refresh_steps == 0

    def _weights(self) -> Snapshot | None:
        """The snapshot, kept where later steps draw with it too: it may be one more copy of the student."""
        newest = self._newest
        if self.trainer.args.rollout_refresh_steps == 1:
            self._newest = None
        return newest

    def save(self, checkpoint: Path) -> None:
        """The weights that the next steps draw with, where a resumed run could not make them again."""
        following = self.trainer.state.global_step + 1
        if self._newest is not None and (following - 1) % self.trainer.args.rollout_refresh_steps != 0:
            self._newest.save(checkpoint / WEIGHTS_FILE)

    def restore(self, checkpoint: Path, mixture: Mapping[str, float | None] | None) -> None:
        """What ``save`` has left there, if anything, and the state of the mixture."""
        if self.mixture is not None and mixture is not None:
            self.mixture.restore(mixture)
        if (checkpoint / WEIGHTS_FILE).is_file():
            self._newest = Snapshot.load(checkpoint / WEIGHTS_FILE)
            self._taken = self._newest.step

    def _made(self, work: Work, step: int) -> Step:
        batches, snapshot = work
        start = time.perf_counter()
        rows = [row for batch in batches for row in batch["rows"]]
        drawn, counts = self._drawn(rows, snapshot, step)
        self.log.note(drawn, rows)
        sizes = [len(batch["rows"]) for batch in batches]
        made = Step(batches=list(self._collated(iter(drawn), sizes)), counts=counts)
        made.seconds["rollout"] = time.perf_counter() - start
        if self.ahead and not self.trainer.teacher_signals.inside_forward:
            self._add_signals(made)
        return made

    def _drawn(self, rows: list[Row], snapshot: Snapshot | None, step: int) -> tuple[list[Row], RolloutCounts]:
        """Rows with completions by an engine that had the snapshot's weights until the end; StaleEngineError otherwise."""
        if snapshot is None:
            return self.rollouts(rows, step=step)
        if snapshot.step != self._held:
            self.engine.sync(snapshot)
            self._held = snapshot.step
        found = self.rollouts(rows, step=step)
        try:
            self.engine.verify(snapshot)
        except StaleEngineError:  # a server that was restarted meanwhile has the weights it started with
            if self.trainer.accelerator.num_processes > 1:
                raise
            self.engine.sync(snapshot)
            found = self.rollouts(rows, step=step)
            self.engine.verify(snapshot)
        return found

    def _collated(self, rows: Iterator[Row], sizes: list[int]) -> Iterator[Batch]:
        for size in sizes:
            yield send_to_device(self.collator([next(rows) for _ in range(size)]), self.trainer.accelerator.device)

    def _add_signals(self, made: Step) -> None:
        start = time.perf_counter()
        made.batches = [{**batch, "positions": self.trainer.positions(batch)} for batch in made.batches]
        made.batches = self.trainer.teacher_signals.all_of(made.batches)
        made.seconds["teacher"] = time.perf_counter() - start

    def clear(self) -> None:
        """Forgets rollouts made ahead."""
        if self._lookahead is not None:
            self._lookahead.clear()
        self._newest, self._taken, self._held = None, -1, -1

    def close(self) -> None:
        """Ends the thread and the engine."""
        if self._lookahead is not None:
            self._lookahead.close()
        self.engine.close()

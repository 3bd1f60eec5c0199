"""The options of consistency training for Jacobi decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from kdlib.data.jacobi import Layout, Schedule
from kdlib.data.jacobi.schedule import Name
from kdlib.decoding.jacobi_init import INITS
from kdlib.trainers.config import DistillationConfig

Source = Literal["auto", "stored", "student", "noise"]
Consistency = Literal["global", "local"]
Context = Literal["clean", "noisy"]
Labels = Literal["trajectory", "teacher", "dataset", "mixed"]
CHOICES = {
    "state_source": get_args(Source),
    "init": INITS,
    "consistency": get_args(Consistency),
    "schedule": get_args(Name),
    "context": get_args(Context),
    "ar_labels": get_args(Labels),
}


@dataclass
class JacobiConfig(DistillationConfig):
    """DistillationConfig with the options of consistency training.

    Args:
        block_size: tokens that are decoded together (n).
        state_source: where a block's states come from: stored (rows of kdlib trajectories jacobi), student (iterated anew in
            every step by the student as it is) or noise (a correct beginning, then tokens of the context; no model runs); auto
            takes what the rows have, and student otherwise.
        init: with student, what a block holds before the first pass: prompt, random or last.
        consistency: what a state is taught: global, the distributions on the block's own text; local, those on its next state.
        schedule: which state of a block is trained: uniform (CLLM), progressive (Jacobi Forcing: noise rises over a window),
            reverse or random.
        context: what a block's states see before the block: clean text (CLLM) or the noisy blocks before it in its window
            (Jacobi Forcing).
        window_size: blocks in a window of the schedule and of noisy context.
        min_noise: with a schedule, the least share of a block from its first wrong token on.
        max_noise: the largest share.
        states_per_block: states of each block trained in a step.
        blocks_per_row: blocks of each row trained in a step, drawn anew every time; null trains all.
        consistency_weight: weight of the mean over the states' rows.
        ar_weight: weight of the auto-regressive term on the text, which keeps the model from drifting.
        ar_labels: what that term learns: trajectory (the row's own text), teacher (the distributions of a teacher with weights
            of its own, by forward KL), dataset (the data set's completion, kept by kdlib trajectories jacobi) or mixed (the
            data set's where the text is too far from it).
        max_distance: with mixed, the largest 1 - similarity (matching tokens, 2 M / total) at which the row's own text is kept.
    """

    block_size: int = 16
    state_source: Source = "auto"
    init: Literal["prompt", "random", "last"] = "prompt"
    consistency: Consistency = "global"
    schedule: Name = "uniform"
    context: Context = "clean"
    window_size: int = 16
    min_noise: float = 0.0
    max_noise: float = 1.0
    states_per_block: int = 1
    blocks_per_row: int | None = None
    consistency_weight: float = 1.0
    ar_weight: float = 10.0
    ar_labels: Labels = "trajectory"
    max_distance: float = 0.5

    def _refuse(self) -> None:
        super()._refuse()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r}: choose {', '.join(choices)}")
        for name, lowest in (("block_size", 2), ("window_size", 1), ("states_per_block", 1), ("blocks_per_row", 1)):
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, not {value}")
        if not 0 <= self.min_noise <= self.max_noise <= 1:
            raise ValueError(f"min_noise {self.min_noise} and max_noise {self.max_noise}: 0 <= min_noise <= max_noise <= 1")
        if self.consistency_weight < 0 or self.ar_weight < 0 or not 0 <= self.max_distance <= 1:
            raise ValueError("consistency_weight and ar_weight are 0 or more, max_distance is from 0 to 1")
        if self.packing:
            raise ValueError("packing puts samples into one row, whose blocks would be read as one text: leave it out")
        if self.context == "noisy" and (
            self.consistency == "local" or self.blocks_per_row is not None or self.states_per_block > 1
        ):
            raise ValueError(
                "context noisy needs the states of all blocks of a window, one of each: "
                "leave out consistency local, blocks_per_row, states_per_block"
            )
        if self.on_policy_fraction and (self.state_source == "stored" or self.ar_labels in ("dataset", "mixed")):
            raise ValueError("rollouts have no stored states or labels: use state_source student and ar_labels trajectory")
        if self.max_staleness:
            raise ValueError("max_staleness scores rollouts before states are chosen: use rollout_refresh_steps")
        if self.on_policy_fraction and self.rollout_source == "corrected":
            raise ValueError("rollout_source corrected is for one distillation term: use student or teacher")

    @property
    def layout(self) -> Layout:
        return Layout(block_size=self.block_size, context=self.context, window_size=self.window_size)

    @property
    def noise_schedule(self) -> Schedule:
        return Schedule(name=self.schedule, window_size=self.window_size, min_noise=self.min_noise, max_noise=self.max_noise)

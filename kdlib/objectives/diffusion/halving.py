"""Step-halving self-distillation (SDTT): one step of the student for several of its teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from kdlib.diffusion.noise import Noise
from kdlib.kernels import linear_objective
from kdlib.objectives.base import RowObjective, State, check_divergence
from kdlib.objectives.diffusion.base import Corruption, DiffusionObjective, Scored, View
from kdlib.objectives.kl import ReverseKL
from kdlib.types import Loss, StudentSignal, Support, TeacherSignal


@dataclass(frozen=True, kw_only=True)
class StepHalving(DiffusionObjective):
    """Mean over the masked tokens l of D(p_l, q_l), p_l from the teacher's step that unmasks l, nats (SDTT, arXiv 2410.21035).

    From the student's view, where tokens are masked with share t, the teacher takes ``teacher_steps`` ancestral steps of
    dt = 1 / ``sampling_steps``: a token with t - dt <= u < t is drawn from the first, and so on; those still masked at the end
    are compared with the last. Each ``refresh_steps`` optimizer steps the student becomes the teacher and dt is multiplied by
    ``teacher_steps``, for ``rounds`` rounds: a teacher of 1024 steps makes students of 512, 256, ... 8.
    The reference gives MASK no mass in either model and draws t from its grid of steps; here t is the noise's own.
    """

    masking = "uniform"
    copies_student = True
    divergence: RowObjective = field(default_factory=ReverseKL)
    teacher_steps: int = 2
    sampling_steps: int = 1024
    refresh_steps: int = 10_000
    rounds: int = 7

    def __post_init__(self) -> None:
        check_divergence(self, self.divergence)
        if self.teacher_steps < 2 or self.refresh_steps < 1 or self.rounds < 1:
            raise ValueError("StepHalving needs teacher_steps >= 2, refresh_steps >= 1 and rounds >= 1")
        if self.sampling_steps < self.teacher_steps**self.rounds:
            raise ValueError(
                f"{self.rounds} rounds of {self.teacher_steps} steps in one leave less than a step of {self.sampling_steps}: "
                "lower StepHalving.rounds, or raise sampling_steps"
            )

    @property
    def accepts(self) -> Support | None:  # type: ignore[override]
        return self.divergence.accepts

    def corrupt(self, noise: Noise) -> Corruption:
        later = [(1.0 - step / (self.sampling_steps * noise.p)).clamp(min=0.0) for step in range(1, self.teacher_steps)]
        masks = [noise.masked(), *(noise.masked(share) for share in later)]
        views = [View(masked=masks[0] | noise.tail)]
        views += [View(masked=now | noise.tail, drawn=before & ~now) for before, now in pairwise(masks)]
        # nested masks: the step that unmasks a token is the number of later states in which it is still masked
        unmasked_by = torch.stack(masks[1:]).sum(0)
        scored = Scored(view=0, where=masks[0], teacher=unmasked_by)
        return Corruption(student=(views[0],), teacher=tuple(views), scored={"distill": scored})

    def terms(
        self, student: Mapping[str, StudentSignal], teacher: Mapping[str, TeacherSignal | None], *, metrics: bool = False
    ) -> dict[str, Loss]:
        return {"distill": linear_objective(student["distill"], teacher["distill"], self.divergence, metrics=metrics)}

    # The rounds of a run

    @property
    def renews_teacher(self) -> bool:
        return self.rounds > 1

    def refreshes(self, step: int) -> bool:
        return step % self.refresh_steps == 0 and step // self.refresh_steps < self.rounds

    def init_state(self, max_steps: int = 1) -> State:
        return {"round": 0.0}

    def update(self, state: Mapping[str, float], global_loss: float, step: int) -> State:
        return {"round": float(min(step // self.refresh_steps, self.rounds - 1))}

    def bind(self, state: Mapping[str, float]) -> StepHalving:
        """The objective of the state's round, with the steps that its teacher takes by then; the first without a state."""
        passed = int(state.get("round", 0))
        steps = self.sampling_steps // self.teacher_steps**passed
        return replace(self, sampling_steps=steps, rounds=self.rounds - passed)

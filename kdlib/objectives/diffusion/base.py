"""What objectives of diffusion language models share: views of a step's rows, named terms on them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from kdlib.diffusion.noise import Noise
from kdlib.objectives.base import Objective
from kdlib.types import Loss, StudentSignal, TeacherSignal


@dataclass(frozen=True, kw_only=True)
class View:
    """Rows as a model reads them: MASK stands where ``masked`` [B, S]. ``drawn`` [B, S], of a teacher's view: tokens which the
    teacher itself draws, from what it says on its view before this one. What was drawn for a view before stays as it is; the
    other tokens are the data's.
    """

    masked: Tensor
    drawn: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The rows of one term: tokens ``where`` [B, S] of the student's view ``view``, each with ``weight`` [B, S] (None: 1).

    ``teacher``: number of the teacher's view whose distributions they are compared with, one for all or [B, S]; None without.
    ``total``: what the sum over the term's rows is divided by (over the whole step); None for the number of rows.
    """

    view: int
    where: Tensor
    weight: Tensor | None = None
    teacher: int | Tensor | None = None
    total: int | None = None


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """A step's views of the rows of a micro-batch, and the terms scored on them."""

    student: tuple[View, ...]
    scored: Mapping[str, Scored]
    teacher: tuple[View, ...] = ()


class DiffusionObjective(Objective):
    """Chooses what is masked and scored (``corrupt``), and makes losses of the models' answers (``terms``).

    ``masking``: the way of masking it is used with where none is asked for. ``student_attention``: what it asks of the student,
    None for the attention that the model has. ``copies_student``: whether its teacher is by default a copy of the student as it
    was at the start or at the last refresh, instead of the student in the same step.
    """

    masking: ClassVar[str]
    student_attention: ClassVar[Literal["block_causal"] | None] = None
    copies_student: ClassVar[bool] = False

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each term's mean in the loss, by the names that ``corrupt`` scores; 1 where not named."""
        return {}

    @abstractmethod
    def corrupt(self, noise: Noise) -> Corruption:
        """The views of this step; everything random is in ``noise``."""

    @abstractmethod
    def terms(
        self, student: Mapping[str, StudentSignal], teacher: Mapping[str, TeacherSignal | None], *, metrics: bool = False
    ) -> dict[str, Loss]:
        """The sum of each term over this micro-batch's rows (those of its ``Scored``, weights included).

        A sum of rows is divided by the step's ``total`` later; a term whose own count depends on the logits is its mean in the
        micro-batch times the micro-batch's rows.
        """

    @property
    def renews_teacher(self) -> bool:
        """Whether it ever does what ``refreshes`` says, so that the teacher has to be a copy."""
        return False

    def refreshes(self, step: int) -> bool:
        """Whether the teacher becomes a copy of the student after optimizer step ``step`` (1-based)."""
        return False

    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None) -> Loss:
        """ValueError: a loss of masked views cannot be taken of one signal."""
        raise ValueError(f"{type(self).__name__} is a loss of masked views of a text: train with kdlib diffusion")

"""What objectives between two tokenizers share: their options, the tables of both vocabularies, and sums over chunks."""

# Annotations are evaluated here (no future import): see objectives/base.py.

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from kdlib.objectives.base import Objective
from kdlib.types import Loss, Positions, StudentSignal, Support, TeacherSignal

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What is known of student and teacher beside their signals; each set where the objective ``needs`` it.

    shared: ids ([M], [M]) of the tokens that spell the same bytes, a token of one side at most once. spaces: which tokens
    begin with white space or are special ([V], [V'] bool). projection: for each student token the teacher's tokens that it
    becomes, ids [V, K] and weights [V, K] that sum to 1 (0 where it has fewer; all 0 where it has none). embeddings: both
    models' input embeddings ([V, D], [V', D']). modules: what ``build_modules`` made, trained with the student.
    """

    shared: Pair | None = None
    spaces: Pair | None = None
    projection: Pair | None = None
    embeddings: Pair | None = None
    modules: nn.Module | None = None


@dataclass(frozen=True, kw_only=True)
class CrossTokenizerObjective(Objective):
    """A loss between models whose tokens differ. ``student.positions`` has ``chunk``, ``chunks`` and ``other``.

    weight: of the distillation term in a step's loss.
    cross_entropy: of the cross-entropy on the student's own tokens beside it; 0 leaves it out.
    balance: gradient divides each term by the norm of its gradient to the hidden states of the step before, so that all pull
        alike, in the proportions of their weights; none takes the weights as they are.
    """

    accepts: ClassVar[Support | None] = Support.FULL
    needs: ClassVar[tuple[str, ...]] = ()  # names of Tables

    weight: float = 1.0
    cross_entropy: float = 1.0
    balance: Literal["none", "gradient"] = "none"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.weight <= 0:
            raise ValueError(f"{name}.weight must be above 0, not {self.weight}: for cross-entropy alone train CrossEntropy")
        if self.cross_entropy < 0:
            raise ValueError(f"{name}.cross_entropy must be 0 or more, not {self.cross_entropy}")
        if self.balance not in ("none", "gradient"):
            raise ValueError(f"{name}.balance is none or gradient, not {self.balance}")

    @abstractmethod
    def __call__(self, student: StudentSignal, teacher: TeacherSignal | None, tables: Tables | None = None) -> Loss:
        """The distillation term: its sum, and the count that ``total`` gives. ``teacher`` [N'] is at ``positions.other``."""

    def total(self, positions: Positions) -> int:
        """What the term's sum is divided by: chunks, unless an objective says otherwise."""
        return positions.chunks

    def side_terms(
        self, student: StudentSignal, teacher: TeacherSignal | None, tables: Tables | None = None
    ) -> dict[str, Loss]:
        """Other terms by name, each divided by ``total`` as well; ``side_weights`` has their weights."""
        return {}

    @property
    def signal_temperature(self) -> float:
        """The temperature at which log-probs of a cache or server, which have one, must have been taken."""
        return 1.0

    @property
    def reads_hidden(self) -> bool:
        """Whether the teacher's hidden states are asked for."""
        return "modules" in self.needs

    @property
    def side_weights(self) -> dict[str, float]:
        """The weights of ``side_terms``."""
        return {}

    def build_modules(self, *, student_width: int, teacher_width: int, seed: int) -> nn.Module | None:
        """Projections [D, D'] that are trained with the student, in float32; None for most."""
        return None


def tables_of(objective: CrossTokenizerObjective, tables: Tables | None) -> Tables:
    """The tables; ValueError where one that the objective needs is not there."""
    missing = [name for name in objective.needs if tables is None or getattr(tables, name) is None]
    if missing:
        raise ValueError(
            f"{type(objective).__name__} needs {' and '.join(missing)} of both sides: train with CrossTokenizerTrainer, "
            "or give Tables"
        )
    return tables or Tables()

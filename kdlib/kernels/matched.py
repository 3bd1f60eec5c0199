"""What every kernel asks of its two signals before it looks at them."""

from __future__ import annotations

from typing import Protocol

from kdlib.types import StudentSignal, Support, TeacherSignal, feeds


class Comparison(Protocol):
    """What is asked of an objective here."""

    @property
    def accepts(self) -> Support | None: ...

    @property
    def same_vocabulary(self) -> bool: ...


def matched(
    student: StudentSignal, teacher: TeacherSignal | None, objective: Comparison
) -> tuple[StudentSignal, TeacherSignal | None]:
    """Both sides over the same rows and the same vocabulary, cut to the smaller where they are padded to different sizes.

    Vocabularies stay as they are where the objective compares different ones.

    Raises ValueError when the teacher's support does not feed the objective or the row counts differ.
    """
    if teacher is None:
        if objective.accepts is not None:
            raise ValueError(f"{type(objective).__name__} needs a teacher's signal")
        return student, None
    if not feeds(teacher.support, objective.accepts):
        raise ValueError(f"{type(objective).__name__} accepts {objective.accepts}, the teacher gives {teacher.support}")
    if len(teacher) != len(student.hidden):
        raise ValueError(f"the teacher speaks of {len(teacher)} rows, the student of {len(student.hidden)}")
    if not objective.same_vocabulary or teacher.vocab_size is None or teacher.vocab_size == student.head.out_features:
        return student, teacher
    shared = min(teacher.vocab_size, student.head.out_features)
    sliced = StudentSignal(
        hidden=student.hidden, head=student.head.sliced(shared), positions=student.positions, features=student.features
    )
    return sliced, teacher.sliced(shared)

"""Where a TeacherSignal comes from: a transformers model in this process, or a cache on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from kdlib.teachers.cache import CachedTeacher
from kdlib.teachers.hf import HFTeacher
from kdlib.types import Teacher

__all__ = ["CachedTeacher", "HFTeacher", "resolve_teacher"]


def resolve_teacher(teacher: str | nn.Module | Teacher | None, options: dict[str, Any]) -> Teacher | None:
    """A Teacher from what users give: a Hub id or model path, a cache directory, a model, or a Teacher.

    ``options`` go to HFTeacher when it loads a model. A URL raises ValueError: served teachers are not in this version.
    """
    if isinstance(teacher, str):
        if teacher.startswith(("http://", "https://")):
            raise ValueError(
                f"teacher {teacher!r}: served teachers are not supported yet; give a model, or a directory made by kdlib cache"
            )
        if (Path(teacher) / "cache.json").is_file():
            return CachedTeacher(teacher)
        return HFTeacher(teacher, **options)
    if isinstance(teacher, nn.Module):
        return HFTeacher(teacher)
    return teacher

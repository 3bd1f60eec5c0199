"""Where a TeacherSignal comes from: a model in this process or behind a server, a cache on disk, the student itself, or
several of these.

Each name is fetched from its module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdlib.lazy import exports

if TYPE_CHECKING:
    from kdlib.teachers.cache import CachedTeacher
    from kdlib.teachers.consistency import ConsistencyEnsemble
    from kdlib.teachers.ensemble import EnsembleTeacher
    from kdlib.teachers.hf import HFTeacher
    from kdlib.teachers.resolve import leaves, resolve_teacher
    from kdlib.teachers.routed import RoutedTeacher
    from kdlib.teachers.self_teacher import SelfTeacher
    from kdlib.teachers.vllm import VLLMTeacher

_HOME = {
    "CachedTeacher": "cache",
    "ConsistencyEnsemble": "consistency",
    "EnsembleTeacher": "ensemble",
    "HFTeacher": "hf",
    "RoutedTeacher": "routed",
    "SelfTeacher": "self_teacher",
    "VLLMTeacher": "vllm",
    "leaves": "resolve",
    "resolve_teacher": "resolve",
}

__all__ = [
    "CachedTeacher",
    "ConsistencyEnsemble",
    "EnsembleTeacher",
    "HFTeacher",
    "RoutedTeacher",
    "SelfTeacher",
    "VLLMTeacher",
    "leaves",
    "resolve_teacher",
]

__getattr__ = exports(__name__, {name: f"{__name__}.{module}" for name, module in _HOME.items()})

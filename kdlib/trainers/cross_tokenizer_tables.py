"""What an objective between tokenizers is told of both models: tables of tokens, embeddings, modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kdlib.models import inner
from kdlib.objectives.cross import Tables
from kdlib.teachers import HFTeacher, VLLMTeacher
from kdlib.tokenizers.projection import token_projection
from kdlib.tokenizers.vocabularies import shared_tokens, space_tokens
from kdlib.trainers.cross_tokenizer_checks import closing_token
from kdlib.trainers.final import MODULES
from kdlib.types import Teacher

if TYPE_CHECKING:
    from kdlib.trainers.cross_tokenizer import CrossTokenizerTrainer

Pair = tuple[Tensor, Tensor]


def make_tables(trainer: CrossTokenizerTrainer) -> Tables:
    """The tables that the objective needs, on the device of training."""
    makers: dict[str, Callable[[CrossTokenizerTrainer], Pair]] = {
        "shared": _shared,
        "spaces": _spaces,
        "projection": _projection,
        "embeddings": _embeddings,
    }
    device = trainer.accelerator.device
    made: dict[str, Any] = {}
    for name in trainer.objective.needs:
        if name in makers:
            first, second = makers[name](trainer)
            made[name] = (first.to(device), second.to(device))
    return Tables(**made, modules=getattr(trainer.accelerator.unwrap_model(trainer.model), MODULES, None))


def build_modules(trainer: CrossTokenizerTrainer, student: nn.Module, *, seed: int) -> nn.Module | None:
    """The objective's modules for the widths of both models; None where it has none, or the teacher no hidden states."""
    width = _teacher_width(trainer.teacher)
    if width is None and trainer.objective.reads_hidden:
        raise ValueError(f"{type(trainer.objective).__name__} reads the teacher's hidden states: use a model, not a cache")
    if width is None:
        return None
    return trainer.objective.build_modules(student_width=_width(inner(student).config), teacher_width=width, seed=seed)


def _width(config: Any) -> int:
    return int(config.get_text_config().hidden_size)


def _teacher_width(teacher: Teacher | None) -> int | None:
    """The width of the hidden states that the teacher gives, if any."""
    if isinstance(teacher, HFTeacher):
        return _width(inner(teacher.model).config)
    return teacher.hidden_size if isinstance(teacher, VLLMTeacher) and teacher.kind == "hidden" else None


def _sizes(trainer: CrossTokenizerTrainer) -> tuple[int, int]:
    first, second = trainer.readers
    return len(first.tokenizer), len(second.tokenizer)


def _shared(trainer: CrossTokenizerTrainer) -> Pair:
    first, second = trainer.readers
    return shared_tokens(first.tokenizer, second.tokenizer, sizes=_sizes(trainer), roles=(_closing(trainer),))


def _closing(trainer: CrossTokenizerTrainer) -> tuple[int | None, int | None]:
    """The tokens that close a turn on both sides."""
    first, second = trainer.readers
    return closing_token(first.tokenizer), closing_token(second.tokenizer)


def _spaces(trainer: CrossTokenizerTrainer) -> Pair:
    first, second = (
        space_tokens(reader.tokenizer, size=size) for reader, size in zip(trainer.readers, _sizes(trainer), strict=True)
    )
    return first, second


def _projection(trainer: CrossTokenizerTrainer) -> Pair:
    first, second = trainer.readers
    return token_projection(first.tokenizer, second.tokenizer, sizes=_sizes(trainer), roles=(_closing(trainer),))


def _embeddings(trainer: CrossTokenizerTrainer) -> Pair:
    """The student's as they are trained, the teacher's as they are."""
    if not isinstance(trainer.teacher, HFTeacher):
        raise ValueError(
            f"{type(trainer.objective).__name__} reads the teacher's embeddings: it needs a teacher in this process"
        )
    student: Any = trainer.accelerator.unwrap_model(trainer.model)
    teacher: Any = trainer.teacher.model
    weights: list[torch.Tensor] = [model.get_input_embeddings().weight for model in (student, teacher)]
    return weights[0], weights[1]

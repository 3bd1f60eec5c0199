"""What a teacher with tokens of its own must bring, before anything is trained."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from kdlib.models import load_tokenizer
from kdlib.objectives.cross import CrossTokenizerObjective, Tables
from kdlib.teachers import CachedTeacher, ConsistencyEnsemble, HFTeacher, RoutedTeacher, SelfTeacher, VLLMTeacher, leaves
from kdlib.tokenizers import same_tokenizer
from kdlib.trainers.config import DistillationConfig
from kdlib.trainers.setup import check_rows_of
from kdlib.trainers.turns import end_of_turn
from kdlib.types import Support, Teacher


def check_tokens(teacher: Teacher | None, args: DistillationConfig) -> None:
    """ValueError for options that need teacher and student to read the same tokens."""
    if args.packing:
        raise ValueError("packed rows of two tokenizers would end at different places: leave packing out")
    if any(isinstance(member, SelfTeacher) for member in leaves(teacher)):
        raise ValueError("SelfTeacher reads the student's tokens: use an objective of one tokenizer, such as ForwardKL")
    if isinstance(teacher, RoutedTeacher):
        raise ValueError("teachers by row need the student's tokenizer: give one teacher, or an ensemble")
    if args.on_policy_fraction and args.rollout_source != "student":
        raise ValueError(
            f"rollout_source {args.rollout_source} writes with a teacher in the student's tokens: use student, or generate the "
            "teacher's answers first (kdlib generate)"
        )


def teacher_tokenizer(teacher: Teacher | None, args: DistillationConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the teacher's rows; ValueError when it is not known or members of an ensemble differ in it."""
    found = [_tokenizer(member, args) for member in leaves(teacher)]
    if any(not same_tokenizer(found[0], other) for other in found[1:]):
        raise ValueError("the teachers of an EnsembleTeacher have different tokenizers: use ConsistencyEnsemble")
    return found[0]


def _tokenizer(member: Teacher, args: DistillationConfig) -> PreTrainedTokenizerBase:
    own = member.tokenizer if isinstance(member, HFTeacher | ConsistencyEnsemble | VLLMTeacher) else None
    name = args.teacher_tokenizer or (member.name if isinstance(member, CachedTeacher) else None)
    if own is not None and args.teacher_tokenizer is None:
        return own
    if name is None:
        raise ValueError(f"{type(member).__name__} has no tokenizer of its own: name it with teacher_tokenizer")
    try:
        return load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    except ValueError as error:
        if args.teacher_tokenizer is not None:
            raise
        raise ValueError(
            f"the cache was made of {name}, whose tokenizer is not here: name it with teacher_tokenizer"
        ) from error


def check_temperature(teacher: Teacher | None, objective: CrossTokenizerObjective) -> None:
    """ValueError for log-probs of another temperature than the objective reads; whole distributions have all."""
    for member in leaves(teacher):
        if isinstance(member, CachedTeacher | VLLMTeacher) and Support.FULL not in member.provides:
            wanted = objective.signal_temperature
            if member.temperature != wanted:
                raise ValueError(
                    f"{type(objective).__name__} reads log-probs at temperature {wanted}, the teacher's are at "
                    f"{member.temperature}: take them again at {wanted}"
                )


def match_own_tokens(teacher: Teacher | None, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig) -> None:
    """Cuts each member's logits to its own tokenizer; ValueError where it was made for another."""
    size = len(tokenizer)
    for member in leaves(teacher):
        check_rows_of(member, tokenizer, args)
        if isinstance(member, HFTeacher | ConsistencyEnsemble):
            main: Any = member if isinstance(member, HFTeacher) else member.teachers[0]
            entries = main.model.get_input_embeddings().weight.shape[0]
            if size > entries:
                raise ValueError(
                    f"the teacher's tokenizer has {size} tokens, the teacher {entries}: it was made for another one"
                )
            member.vocab_size = size


def closing_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the teacher's turns end: that of its chat template, or its end of text."""
    found = end_of_turn(tokenizer, {})
    return tokenizer.eos_token_id if found is None else found


def check_sharding(objective: CrossTokenizerObjective, tables: Tables, accelerator: Accelerator) -> None:
    """ValueError where FSDP would shard what the objective reads beside the student's head."""
    read = [name for name in ("modules", "embeddings") if getattr(tables, name) is not None]
    if read and accelerator.distributed_type == "FSDP":
        name = type(objective).__name__
        raise ValueError(f"{name} needs its {' and '.join(read)} whole on each process, which FSDP does not keep: use ddp")

"""What diffusion training refuses before a model is loaded, and what follows from its options: spec, teacher's reading."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from kdlib.data import Prepared
from kdlib.diffusion.convert import check_diffusion, with_mask_token
from kdlib.diffusion.known import known_spec
from kdlib.diffusion.masking import Masking
from kdlib.diffusion.spec import DiffusionSpec
from kdlib.models import load_config
from kdlib.objectives.diffusion.base import DiffusionObjective
from kdlib.teachers import HFTeacher, SelfTeacher
from kdlib.trainers.diffusion_config import DiffusionConfig
from kdlib.trainers.diffusion_layout import Layout


def check_objective(objective: Any) -> DiffusionObjective:
    """The objective; ValueError for one of other trainers."""
    if not isinstance(objective, DiffusionObjective):
        raise ValueError(
            f"{type(objective).__name__} is no objective of diffusion models: choose MaskedELBO, CertaintyForcing or another "
            "DiffusionObjective, or train with kdlib distill"
        )
    return objective


def check_teacher(teacher: Any, objective: DiffusionObjective, spec: DiffusionSpec) -> None:
    """ValueError for a teacher that does not read rows masked for ``spec`` and give whole distributions on them."""
    if teacher is not None and not isinstance(teacher, SelfTeacher | HFTeacher):
        raise ValueError(
            "a diffusion teacher reads masked rows in this process: a path, or SelfTeacher (student, copy, ema or "
            f"adapter_off), not {type(teacher).__name__}"
        )
    if teacher is not None and objective.accepts is None:
        raise ValueError(f"{type(objective).__name__} compares with no teacher: leave teacher out")
    if objective.renews_teacher and not (isinstance(teacher, SelfTeacher) and teacher.keeps_weights):
        raise ValueError(
            f"{type(objective).__name__} renews its teacher in rounds: leave teacher out (a copy of the student), or set "
            "objective.rounds 1 to learn from another"
        )
    if isinstance(teacher, HFTeacher):
        own = known_spec(teacher.model.config) or spec
        check_diffusion(teacher.model, own, role="teacher")
        if own.mask_token_id != spec.mask_token_id:
            raise ValueError(
                f"the teacher's mask token is id {own.mask_token_id}, the student's {spec.mask_token_id}: "
                "they have to read the same rows"
            )


def student_spec(
    model: str | nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    args: DiffusionConfig,
    *,
    objective: DiffusionObjective,
    makes: bool,
    adapted: bool = False,
) -> DiffusionSpec:
    """The spec that the student will have; ``makes``: whether an auto-regressive model may become a diffusion model;
    ``adapted``: whether an adapter alone is trained.

    Raises ValueError without a mask token, for a new one below an adapter, for a model that is none where it has to be one, and
    for another attention than the objective is for.
    """
    config: Any = (
        load_config(model, revision=args.model_revision, trust_remote_code=args.trust_remote_code)
        if isinstance(model, str)
        else model.config
    )
    known = known_spec(config)
    if known is None and not makes:
        raise ValueError(
            f"{config.name_or_path or config.model_type} is no diffusion model: make one with objective MaskedELBO first, "
            "kdlib diffusion --mask_token '<|mask|>'"
        )
    if adapted and known is None and args.mask_token is not None and args.mask_token not in tokenizer.get_vocab():
        raise ValueError(
            f"an adapter leaves the embedding of the new mask token {args.mask_token} as it is: train the whole model with "
            "MaskedELBO first (use_peft false), or choose a token that the tokenizer has"
        )
    if known is None and not args.merge_adapter:
        raise ValueError("merge_adapter false would write an adapter alone, without what makes its base a diffusion model")
    mask = known.mask_token_id if known is not None else with_mask_token(tokenizer, args.mask_token)
    spec = args.spec(known, mask_token_id=mask, eos_token_id=tokenizer.eos_token_id)
    if spec.mask_token_id is None:
        raise ValueError(f"{config.model_type} has no mask token (attention {spec.attention}): kdlib does not train it")
    if objective.student_attention not in (None, spec.attention):
        raise ValueError(
            f"{type(objective).__name__} is for a student of {objective.student_attention} attention: "
            f"add --attention {objective.student_attention}"
        )
    return spec


def teacher_layout(teacher: Any, objective: DiffusionObjective, spec: DiffusionSpec) -> Layout:
    """How the teacher reads masked rows: as its own spec says or, made of the student, as that does; with full attention where
    the objective asks the student alone for less.
    """
    own = known_spec(teacher.model.config) if isinstance(teacher, HFTeacher) else None
    read = own or spec
    if objective.student_attention is not None:
        read = replace(read, attention="full")
    return Layout(spec=read)


def check_rows(rows: Prepared | None, masking: Masking, *, mask_token_id: int | None) -> None:
    """ValueError for rows that hold the mask token, and for rows without commit steps where masks follow their order."""
    if rows is None:
        return
    if masking.kind == "trajectory" and "commit_step" not in rows.dataset.column_names:
        raise ValueError("masking trajectory needs rows of kdlib trajectories diffusion, which say in which step a token came")
    for batch in rows.dataset.with_format("arrow").iter(batch_size=4096):
        if (batch["input_ids"].combine_chunks().flatten().to_numpy() == mask_token_id).any():
            raise ValueError(f"the rows hold the mask token (id {mask_token_id}), which means a token that is not known")

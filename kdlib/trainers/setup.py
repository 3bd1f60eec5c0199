"""From what users give to what the trainer needs, with one clear line for what does not fit."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import PeftConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from kdlib.data import Prepared, load_rows, prepare_dataset
from kdlib.models import check_causal, load_config, load_model, load_tokenizer
from kdlib.objectives import Objective, ReverseKL, RowObjective, SelectiveKL, Sinkhorn, SkewReverseKL, Sum
from kdlib.objectives.cross import CrossTokenizerObjective
from kdlib.objectives.diffusion import DiffusionObjective
from kdlib.teachers import (
    CachedTeacher,
    ConsistencyEnsemble,
    HFTeacher,
    RoutedTeacher,
    SelfTeacher,
    VLLMTeacher,
    leaves,
)
from kdlib.tokenizers import explain_difference, same_tokenizer
from kdlib.trainers.config import DistillationConfig
from kdlib.trainers.repeats import RepeatedRows
from kdlib.types import Support, Teacher, feeds

logger = logging.getLogger("kdlib")


def default_output_dir(model: str | nn.Module) -> str:
    """NAME-distillation in the working directory."""
    name = model if isinstance(model, str) else str(model.config.name_or_path or "student")  # type: ignore[union-attr]
    return f"{Path(name).name}-distillation"


def student_tokenizer(model: str | nn.Module, args: DistillationConfig) -> PreTrainedTokenizerBase:
    """The tokenizer beside the student."""
    name = model if isinstance(model, str) else str(model.config.name_or_path)  # type: ignore[union-attr]
    if not name:
        raise ValueError("the student was made in memory and has no tokenizer beside it: give processing_class")
    return load_tokenizer(name, revision=args.model_revision, trust_remote_code=args.trust_remote_code)


def student(
    model: str | nn.Module, args: DistillationConfig, *, quantization_config: Any = None, peft_config: PeftConfig | None = None
) -> nn.Module:
    """The student, loaded or made from its configuration, quantised and with an adapter where asked for."""
    made = _made(model, args, quantization_config, adapted=peft_config is not None)
    if quantization_config is not None:
        if peft_config is None:
            raise ValueError("a quantised student cannot be trained whole: add an adapter (use_peft true)")
        made = prepare_model_for_kbit_training(made, use_gradient_checkpointing=args.gradient_checkpointing)
    if peft_config is not None:
        made = _adapted(made, peft_config, args)
    if args.disable_dropout:
        _without_dropout(made)
    return made


def _without_dropout(model: nn.Module) -> None:
    """Modules of dropout, and rates that a module hands to a function, as attention does."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if name.endswith("dropout") and isinstance(value, float):
                setattr(module, name, 0.0)


def _made(model: str | nn.Module, args: DistillationConfig, quantization_config: Any, *, adapted: bool) -> nn.Module:
    if not isinstance(model, str):
        if args.from_scratch:
            raise ValueError("from_scratch makes a student from a path's configuration: it cannot be used with a loaded model")
        return model
    return _new(model, args) if args.from_scratch else _loaded(model, args, quantization_config, adapted=adapted)


def published_dtype(model: str | nn.Module, args: DistillationConfig) -> torch.dtype:
    """The dtype the student was published in, which final/ is written in; float32 for a new one."""
    if not isinstance(model, str):
        return next(model.parameters()).dtype
    if args.from_scratch:
        return torch.float32
    config = load_config(model, revision=args.model_revision, trust_remote_code=args.trust_remote_code)
    return config.dtype or torch.float32


def _loaded(name: str, args: DistillationConfig, quantization_config: Any, *, adapted: bool) -> nn.Module:
    # whole models are trained on float32 master weights: bfloat16 ones lose small updates
    dtype = args.dtype or ("auto" if adapted or quantization_config is not None else "float32")
    return load_model(
        name,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        quantization_config=quantization_config,
        revision=args.model_revision,
        trust_remote_code=args.trust_remote_code,
    )


def _new(name: str, args: DistillationConfig) -> nn.Module:
    config = load_config(name, revision=args.model_revision, trust_remote_code=args.trust_remote_code)
    unknown = [key for key in args.config_overrides or {} if key not in config.to_dict()]
    if unknown:
        raise ValueError(f"config_overrides: {', '.join(unknown)} not in the {config.model_type} configuration of {name}")
    config.update(args.config_overrides or {})
    torch.manual_seed(args.seed)
    made = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=args.attn_implementation, trust_remote_code=args.trust_remote_code
    )
    made.config.name_or_path = ""
    return made


def _adapted(model: nn.Module, peft_config: PeftConfig, args: DistillationConfig) -> nn.Module:
    if peft_config.is_prompt_learning:
        raise ValueError("prompt-learning adapters prepend tokens that the loss cannot place: use LoRA")
    if args.gradient_checkpointing:
        model.enable_input_require_grads()  # type: ignore[operator]
    adapted = get_peft_model(model, peft_config)
    if not any(p.requires_grad for p in adapted.parameters()):
        raise ValueError("the adapter trains nothing: no module matches lora_target_modules")
    targets = peft_config.target_modules
    matched = adapter_modules(adapted)
    if isinstance(targets, list | set) and (
        missed := sorted(target for target in targets if target.split(".")[-1] not in matched)
    ):
        logger.warning("lora_target_modules: %s match no module; matched: %s", ", ".join(missed), ", ".join(matched))
    return adapted


def adapter_modules(model: nn.Module) -> dict[str, int]:
    """{name: how many} of the modules that carry an adapter, by the last part of their names."""
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return dict(Counter(names))


def check_reading(student: nn.Module, teacher: Teacher | None, *, masks_rows: bool) -> None:
    """ValueError for models that read both ways where rows are not masked: they would look at the tokens that they predict."""
    if masks_rows:
        return
    check_causal(student, role="student")
    for member in leaves(teacher):
        for model in member.teachers if isinstance(member, ConsistencyEnsemble) else (member,):
            if isinstance(model, HFTeacher):
                check_causal(model.model, role="teacher")


def checked_objective(
    objective: Objective, *, selects_rows: bool, masks_rows: bool, transports_rows: bool = False, aligns_rows: bool = False
) -> Objective:
    """The objective; ValueError for what is none, and for one of another trainer, where nothing would select or mask rows."""
    if not isinstance(objective, Objective):
        raise ValueError(f"objective must be a kdlib.objectives.Objective, not {type(objective).__name__}")
    if any(isinstance(part, SelectiveKL) for part in _parts(objective) if part is not objective):
        raise ValueError("SelectiveKL keeps some rows and drops the others for all: it cannot be part of another objective")
    if isinstance(objective, SelectiveKL) and not selects_rows:
        raise ValueError("SelectiveKL chooses rows with a reference model: train with kdlib draft (DraftTrainer)")
    if isinstance(objective, DiffusionObjective) and not masks_rows:
        raise ValueError(f"{type(objective).__name__} is a loss of masked views: train with kdlib diffusion (DiffusionTrainer)")
    if isinstance(objective, Sinkhorn) and not transports_rows:
        raise ValueError("Sinkhorn is a loss of groups of rows: train with kdlib distill (SinkhornTrainer)")
    if isinstance(objective, CrossTokenizerObjective) and not aligns_rows:
        name = type(objective).__name__
        raise ValueError(f"{name} is a loss between two tokenizers: train with kdlib distill (CrossTokenizerTrainer)")
    return objective


def _parts(objective: Objective) -> list[Objective]:
    """The objective, and those that it is made of."""
    inside: list[Objective] = [part for _, part in objective.parts] if isinstance(objective, Sum) else []
    if isinstance(objective, Sinkhorn) and objective.divergence is not None:
        inside = [objective.divergence]
    return [objective, *(found for part in inside for found in _parts(part))]


def check_pair(teacher: Teacher | None, objective: Objective) -> None:
    """ValueError naming both when the teacher cannot feed the objective; a warning where it feeds it badly."""
    if teacher is None and objective.accepts is not None:
        raise ValueError(f"{type(objective).__name__} needs a teacher: give one (--teacher), or train with CrossEntropy")
    if teacher is None:
        return
    if not feeds(teacher.provides, objective.accepts):
        raise ValueError(
            f"{type(teacher).__name__} provides {teacher.provides}, which cannot feed {type(objective).__name__}: "
            f"it accepts {objective.accepts}; choose another objective, or a teacher that is run in training"
        )
    for member in leaves(teacher):
        if isinstance(member, CachedTeacher | VLLMTeacher) and Support.FULL not in member.provides:
            _check_temperature(member, objective)
    reverse = [part for part in _parts(objective) if isinstance(part, ReverseKL | SkewReverseKL)]
    if Support.FULL not in teacher.provides and reverse:
        logger.warning(
            "%s on the teacher's top k alone: what the student does outside of it is seen as one outcome, which pulls mass "
            "there; signal hidden (a pooling server) is exact, ForwardKL is safer",
            type(reverse[0]).__name__,
        )


def _check_temperature(teacher: CachedTeacher | VLLMTeacher, objective: Objective) -> None:
    """Truncated log-probs exist at the temperature at which they were taken."""
    for name, temperature in _temperatures(objective):
        if temperature == teacher.temperature:
            continue
        option = "objective.temperature" if name == type(objective).__name__ else f"the temperature of {name}"
        again = f"run kdlib cache again with --temperature {temperature}"
        raise ValueError(
            f"{name} has temperature {temperature}, the teacher's log-probs are at {teacher.temperature}: "
            f"set {option} to {teacher.temperature}, or "
            + (again if isinstance(teacher, CachedTeacher) else "use signal hidden (a pooling server)")
        )


def _temperatures(objective: Objective) -> list[tuple[str, float]]:
    """(name, temperature) of the parts of an objective that ask the teacher."""
    asking = [part for part in _parts(objective) if part.accepts is not None and not isinstance(part, Sum)]
    return [(type(part).__name__, part.temperature) for part in asking if isinstance(part, RowObjective | Sinkhorn)]


def match_tokenizers(teacher: Teacher | None, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig) -> int:
    """What all models' logits are cut to: the tokenizer's length. ValueError when the tokenizers differ."""
    size = len(tokenizer)
    for member in leaves(teacher):
        check_rows_of(member, tokenizer, args)
        if isinstance(member, HFTeacher | ConsistencyEnsemble):
            _check_same(tokenizer, member.tokenizer)
        if isinstance(member, HFTeacher | ConsistencyEnsemble | SelfTeacher):
            member.vocab_size = size
    return size


def check_rows_of(member: Teacher, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig) -> None:
    """ValueError for a cache or server that does not read rows of the tokenizer; a server's logits are cut to it."""
    if isinstance(member, CachedTeacher):
        member.check(tokenizer, chat_template_kwargs=args.chat_template_kwargs)
    if isinstance(member, VLLMTeacher):
        member.check(tokenizer, len(tokenizer), max_length=args.max_length if args.on_policy_fraction < 1 else None)


def _check_same(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase | None) -> None:
    if teacher is not None and not same_tokenizer(student, teacher):
        raise ValueError(
            "student and teacher have different tokenizers, so their logits mean different tokens: "
            f"{explain_difference(student, teacher)}; "
            "choose an objective between tokenizers, such as ALM (CrossTokenizerTrainer)"
        )


def self_teachers(teacher: Teacher | None) -> list[SelfTeacher]:
    """Those among the teachers that are made of the student."""
    return [member for member in leaves(teacher) if isinstance(member, SelfTeacher)]


def check_rollouts(teacher: Teacher | None, objective: Objective, args: DistillationConfig) -> None:
    """ValueError for what rollouts cannot be trained on with."""
    own = args.on_policy_fraction > 0 and args.rollout_source != "teacher"
    if not own and isinstance(objective, RowObjective) and objective.reads_drawn:
        raise ValueError("SampledReverseKL learns from the student's own samples: set on_policy_fraction 1")
    _check_drawn(teacher, objective, args)
    if args.on_policy_fraction == 0:
        return
    if any(isinstance(member, CachedTeacher) for member in leaves(teacher)):
        raise ValueError("a cache knows the dataset's own completions only: on_policy_fraction needs the teacher itself")
    if args.rollout_source == "corrected" and (teacher is None or not feeds(teacher.provides, Support.FULL | Support.TOPK)):
        raise ValueError("rollout_source corrected needs a teacher with whole distributions or its top k")
    if args.rollout_source == "teacher" and teacher is None:
        raise ValueError("rollout_source teacher needs a teacher")


def _check_drawn(teacher: Teacher | None, objective: Objective, args: DistillationConfig) -> None:
    """ReverseKL takes the one token that such a teacher scores as drawn from the student, which has to have written it."""
    if teacher is None or teacher.provides is not Support.SAMPLED_STUDENT:
        return
    if args.on_policy_fraction == 1 and args.rollout_source == "student":
        return
    if any(isinstance(part, ReverseKL) for part in _parts(objective)):
        raise ValueError(
            "ReverseKL on log-probs of the row's own tokens learns from the student's own samples: set on_policy_fraction 1, "
            "or give a teacher with a top k or whole distributions"
        )


def prepared(
    rows: Any, tokenizer: PreTrainedTokenizerBase, args: DistillationConfig, *, packing: bool, training: bool = False
) -> Prepared | None:
    """Token rows from a path, a list, a raw Dataset or an already prepared one."""
    if rows is None or isinstance(rows, Prepared):
        return rows
    found = opened(rows)
    if {"input_ids", "labels", "sample_id"} <= set(found.column_names):
        return Prepared(dataset=found, skipped=0, reasons={}, truncated=0)
    return prepare_dataset(found, tokenizer, packing=packing, **preparation(args, training=training))


def opened(rows: str | list[dict[str, Any]] | Dataset) -> Dataset:
    """The rows of a path, a list or a Dataset."""
    if isinstance(rows, str):
        return load_rows(rows)
    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def preparation(args: DistillationConfig, *, training: bool) -> dict[str, Any]:
    """How rows become token rows, for any tokenizer."""
    return {
        "max_length": args.max_length,
        "chat_template_kwargs": args.chat_template_kwargs,
        "skip_bad_rows": args.skip_bad_rows,
        "num_proc": args.dataset_num_proc,
        "prompts_only": training and args.on_policy_fraction == 1.0,
    }


def repeated(rows: Dataset, args: DistillationConfig) -> Any:
    """The rows as often as completions are drawn for them."""
    return RepeatedRows(rows, times=args.num_generations) if args.num_generations > 1 else rows


def check_cached(teacher: Teacher | None, train: Prepared | None, held_out: Prepared | None) -> None:
    """ValueError before training when a cached teacher does not know the rows, or a row's teacher is none of those given."""
    if isinstance(teacher, CachedTeacher | RoutedTeacher):
        for what, rows in (("training", train), ("evaluation", held_out)):
            if rows is not None:
                teacher.check_rows(rows.dataset, what=what)


def check_labels(rows: Prepared | None, vocab_size: int) -> None:
    """ValueError when a prepared row holds ids beyond the vocabulary, as rows of another tokenizer do."""
    if rows is None:
        return
    for batch in rows.dataset.with_format("arrow").iter(batch_size=4096):
        flat = batch["input_ids"].combine_chunks().flatten().to_numpy()
        if len(flat) and (np.max(flat) >= vocab_size or np.min(flat) < 0):
            raise ValueError(
                f"the rows hold token id {int(np.max(flat))}, the tokenizer has {vocab_size}: "
                "they were made with another tokenizer"
            )


def check_parallelism(args: DistillationConfig, accelerator: Accelerator, teacher: Teacher | None) -> None:
    """ValueError for ways of running that would train wrongly."""
    if args.n_gpu > 1:
        raise ValueError(
            "several GPUs in one process (DataParallel) are not supported: start with accelerate launch or torchrun"
        )
    sharded = accelerator.distributed_type == "FSDP"
    if sharded and any(member.keeps_weights for member in self_teachers(teacher)):
        raise ValueError("SelfTeacher of kind ema or copy needs the student's whole weights on each process: use ddp, not fsdp")
    if sharded and args.on_policy_fraction:
        raise ValueError("rollouts need the student's whole weights on each process, which FSDP does not keep: use ddp")
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        raise ValueError("DeepSpeed ZeRO-3 partitions the lm_head, which the loss needs whole: use ZeRO-2, or FSDP2")


def place(teacher: Teacher | None, device: torch.device) -> None:
    for member in leaves(teacher):
        if isinstance(member, HFTeacher | ConsistencyEnsemble):
            member.place(device)

"""The options of kdlib distill; field docs are what --help prints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kdlib.objectives import ForwardKL, Objective


@dataclass
class RunArguments:
    """What is distilled into what, on which rows.

    Args:
        model: the student, a path or Hub id.
        dataset_name: training rows: a .jsonl, .json, .csv, .parquet or .txt file, a glob, a saved dataset
            or a Hub id.
        teacher: a path, Hub id, directory made by kdlib cache, or URL of a vLLM server; a list of URLs that serve the
            same; a mapping of names to teachers, of which each row names one; EnsembleTeacher or SelfTeacher; none for
            CrossEntropy alone.
        objective: the loss, one of those below; its options are --objective.OPTION.
        dataset_config: configuration name of a Hub dataset.
        dataset_train_split: split of the training rows.
        eval_dataset_name: rows for the evaluation loss; dataset_name when only dataset_test_split is given.
        dataset_test_split: split of the evaluation rows.
        overwrite: start anew in an output_dir that holds another run, deleting that run.
        preview: show this many rows with their scored tokens marked, and exit.
    """

    model: str
    dataset_name: str
    teacher: Any = None
    objective: Objective = field(default_factory=ForwardKL)
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    eval_dataset_name: str | None = None
    dataset_test_split: str | None = None
    overwrite: bool = False
    preview: int = 0


@dataclass
class AdapterArguments:
    """LoRA and quantisation of the student, by TRL's names.

    Args:
        use_peft: train a LoRA adapter instead of all weights.
        lora_r: rank of the adapter.
        lora_alpha: the adapter is scaled by lora_alpha / lora_r.
        lora_dropout: dropout before the adapter; 0 when lm_head is among the targets.
        lora_target_modules: modules that get an adapter; all linear layers but lm_head when left out.
        lora_modules_to_save: modules trained whole beside the adapter, for example lm_head.
        use_rslora: scale by lora_alpha / sqrt(lora_r).
        load_in_8bit: load the student in 8 bits (needs bitsandbytes).
        load_in_4bit: load the student in 4 bits, QLoRA (needs bitsandbytes).
    """

    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    lora_target_modules: list[str] | None = None
    lora_modules_to_save: list[str] | None = None
    use_rslora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False


@dataclass
class LaunchArguments:
    """Several processes on one machine.

    Args:
        num_processes: start this many processes with accelerate launch.
        accelerate_config: ddp, fsdp2 or an accelerate YAML file.
    """

    num_processes: int | None = None
    accelerate_config: str | None = None

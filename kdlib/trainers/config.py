"""The options of a distillation run beyond those of transformers.TrainingArguments."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from transformers import TrainingArguments

from kdlib.samplers.config import RolloutConfig
from kdlib.trainers.golden_options import keep_best, refuse_golden
from kdlib.trainers.rows_config import RowsConfig


@dataclass
class DistillationConfig(RowsConfig, TrainingArguments):
    """TrainingArguments with defaults for distillation, and how rows, student and teacher are prepared.

    Args:
        learning_rate: peak learning rate; 2e-5 suits full fine-tuning of pretrained students, LoRA wants about 10x more.
        lr_scheduler_type: cosine, which needs no further setting.
        logging_steps: every how many optimizer steps to log; KL, entropies and agreement are measured on these steps only.
        logging_first_step: log step 1 as well, so that short runs have metrics too.
        save_strategy: when to write checkpoints; the same command resumes from the last one.
        save_total_limit: how many checkpoints to keep.
        bf16: compute in bfloat16 with float32 master weights; null means on GPUs that have it.
        gradient_checkpointing_kwargs: options of gradient checkpointing.
        logging_nan_inf_filter: off, so that a loss that is not finite is seen (and stops the run).
        use_cache: what the saved configuration says about generating; training never keeps a cache.
        report_to: trackers such as wandb or tensorboard; metrics.jsonl and report.html are always written.
        max_length: rows longer than this keep their first max_length tokens.
        packing: put several rows into one of max_length tokens, without attention between them.
        skip_bad_rows: drop rows that cannot be trained on (no assistant turn, a prompt that fills max_length), counted.
        chat_template_kwargs: passed to the chat template in training, cache keys and evaluation.
        dataset_num_proc: processes that tokenise the dataset.
        dtype: the student's weights: float32, bfloat16 or auto; null means float32, and auto with an adapter.
        attn_implementation: sdpa, eager, flash_attention_2 or another of transformers.
        from_scratch: make the student from its configuration with new weights instead of loading them.
        config_overrides: with from_scratch, entries of that configuration to change, for example {hidden_size: 128}.
        model_revision: branch, tag or commit of the student on the Hub.
        trust_remote_code: run the code that a model on the Hub brings. Off unless you have read it.
        teacher_dtype: the teacher's weights: auto (as saved), float32 or bfloat16.
        teacher_attn_implementation: like attn_implementation, for the teacher.
        teacher_device_map: device map of the teacher, for one that needs several GPUs of a process.
        teacher_revision: branch, tag or commit of the teacher on the Hub.
        teacher_load_in_8bit: load the teacher in 8 bits (needs bitsandbytes).
        teacher_load_in_4bit: load the teacher in 4 bits (needs bitsandbytes).
        teacher_backend: hf runs a teacher's path with transformers, vllm in an engine in this process.
        teacher_checkpoint: path or Hub id of what the teacher's URL serves, where the server's own name for it is neither.
        teacher_tokenizer: path or Hub id of the tokenizer of a teacher with another one than the student, where it does not lie
            beside the teacher (a cache).
        signal: what a served teacher says: hidden (exact, needs a pooling server), topk or sampled; auto takes what the
            server has.
        signal_top_k: how many log-probs per token a served teacher gives with signal topk.
        teacher_timeout: seconds that one request to a served teacher may take.
        teacher_patience: seconds to wait for a served teacher that went away, before the run stops with a checkpoint.
        teacher_concurrency: requests to a served teacher at a time.
        disable_dropout: set all dropout of the student to 0.
        on_policy_fraction: share of rows trained on a completion drawn in this step instead of their own (GKD's lambda).
        rollout_source: who writes these completions: student, teacher (sequence-level KD), or corrected (the student, its
            first wrong token replaced by the teacher's).
        correction_threshold: with corrected, a token is wrong when the teacher gives it less than this share of what it
            gives to its likeliest one.
        num_generations: completions per prompt; each counts as a row of a batch.
        generation_batch_size: completions drawn at a time; null draws all of an optimizer step's at once.
        max_completion_length: new tokens of a rollout; one cut there is scored and not taught to end.
        max_staleness: how many optimizer steps old the weights that draw rollouts may be. 0 is strictly on-policy and
            reproducible; above it rollouts and teacher run while the student is updated.
        rollout_refresh_steps: every how many optimizer steps the weights that draw rollouts are renewed; reproducible for any
            value, and strictly on-policy with 1.
        rollout: the engine that draws rollouts, and how it samples.
        merge_adapter: write final/ with the adapter merged into the weights; false keeps it an adapter.
        golden_dataset_name: rows with verified answers, or those of a better model: what they cost the student is measured at
            every evaluation, to see when it fits the teacher's faults.
        golden_teacher: path or Hub id of a better teacher, to whom KL on the evaluation rows is measured instead.
        golden_stop: stop at the alarm, and end with the student that was best by the golden metric.
        hub_strategy: with push_to_hub, end pushes final/ when it is written, every_save also the student at each checkpoint.
        license: licence of the student, for its card; null takes the one that teacher and base model agree on.
    """

    learning_rate: float = 2e-5
    lr_scheduler_type: str = "cosine"
    logging_steps: float = 10
    logging_first_step: bool = True
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    bf16: bool | None = None
    gradient_checkpointing_kwargs: dict[str, Any] | None = field(default_factory=lambda: {"use_reentrant": False})
    logging_nan_inf_filter: bool = False
    use_cache: bool = True  # transformers' False would be published with the student
    report_to: str | list[str] | None = "none"

    max_length: int = 1024
    packing: bool = False
    skip_bad_rows: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    dataset_num_proc: int | None = None

    from_scratch: bool = False
    config_overrides: dict[str, Any] | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    model_revision: str | None = None
    trust_remote_code: bool = False
    teacher_dtype: str = "auto"
    teacher_attn_implementation: str | None = None
    teacher_device_map: str | dict[str, Any] | None = None
    teacher_revision: str | None = None
    teacher_load_in_8bit: bool = False
    teacher_load_in_4bit: bool = False
    teacher_backend: Literal["hf", "vllm"] = "hf"
    teacher_checkpoint: str | None = None
    teacher_tokenizer: str | None = None
    signal: Literal["auto", "hidden", "topk", "sampled"] = "auto"
    signal_top_k: int = 64
    teacher_timeout: float = 120.0
    teacher_patience: float = 300.0
    teacher_concurrency: int = 8
    disable_dropout: bool = False

    on_policy_fraction: float = 0.0
    rollout_source: Literal["student", "teacher", "corrected"] = "student"
    correction_threshold: float = 0.1
    num_generations: int = 1
    generation_batch_size: int | None = None
    max_completion_length: int = 256
    max_staleness: int = 0
    rollout_refresh_steps: int = 1
    rollout: RolloutConfig = field(default_factory=RolloutConfig)

    merge_adapter: bool = True

    golden_dataset_name: str | None = None
    golden_teacher: str | None = None
    golden_stop: bool = False

    hub_strategy: str = "end"
    license: str | None = None

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.remove_unused_columns = False  # the collator's columns are not the model's
        if self.golden_stop:
            keep_best(self)
        super().__post_init__()
        self._refuse()

    def _refuse(self) -> None:
        if self.config_overrides and not self.from_scratch:
            raise ValueError("config_overrides change the shape of a new student: add from_scratch true")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be above 0, not {self.learning_rate}")
        if self.max_length < 2:
            raise ValueError(
                f"max_length must be at least 2, not {self.max_length}: position 0 predicts the first scored token"
            )
        if self.torch_compile:
            raise ValueError("torch_compile is not supported here: the loss runs inside the wrapper's forward; leave it out")
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor has no effect on distillation losses: leave it out")
        if self.use_liger_kernel:
            raise ValueError("use_liger_kernel would replace the loss: kdlib has its own chunked kernel; leave it out")
        refuse_golden(self)
        self._refuse_rollouts()
        self.refuse_rows(packing=self.packing, on_policy_fraction=self.on_policy_fraction)

    def _refuse_rollouts(self) -> None:
        if not 0.0 <= self.on_policy_fraction <= 1.0:
            raise ValueError(f"on_policy_fraction is a share of rows, from 0 to 1, not {self.on_policy_fraction}")
        for name, lowest in (
            ("num_generations", 1),
            ("max_completion_length", 1),
            ("max_staleness", 0),
            ("signal_top_k", 1),
            ("rollout_refresh_steps", 1),
        ):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} must be at least {lowest}, not {getattr(self, name)}")
        if self.generation_batch_size is not None and self.generation_batch_size < 1:
            raise ValueError(f"generation_batch_size must be at least 1, not {self.generation_batch_size}")
        if not 0.0 < self.correction_threshold <= 1.0:
            raise ValueError(f"correction_threshold must be above 0 and at most 1, not {self.correction_threshold}")
        if self.on_policy_fraction == 0:
            if self.num_generations > 1:
                raise ValueError("num_generations above 1 repeats rows that are not drawn: add on_policy_fraction")
            return
        if self.packing:
            raise ValueError(
                "packing puts dataset rows together before rollouts are drawn: leave it out with on_policy_fraction"
            )
        if self.max_staleness and self.rollout_refresh_steps > 1:
            raise ValueError("rollout_refresh_steps renews weights at given steps, max_staleness when they are ready: use one")
        if self.rollout_refresh_steps > 1 and self.rollout_source == "corrected":
            raise ValueError("corrected rollouts are finished by the student as it is: they need rollout_refresh_steps 1")
        if self.max_staleness and self.rollout_source == "corrected":
            raise ValueError("corrected rollouts go back and forth between student and teacher: they need max_staleness 0")

    @property
    def teacher_options(self) -> dict[str, Any]:
        """How a teacher's path is loaded, and under ``served`` how a URL is asked."""
        return {
            "dtype": self.teacher_dtype,
            "attn_implementation": self.teacher_attn_implementation,
            "device_map": self.teacher_device_map,
            "revision": self.teacher_revision,
            "trust_remote_code": self.trust_remote_code,
            "load_in_8bit": self.teacher_load_in_8bit,
            "load_in_4bit": self.teacher_load_in_4bit,
            "backend": self.teacher_backend,
            "served": {
                "signal": self.signal,
                "k": self.signal_top_k,
                "model": self.teacher_checkpoint,
                "dtype": self.teacher_dtype,
                "revision": self.teacher_revision,
                "trust_remote_code": self.trust_remote_code,
                "timeout": self.teacher_timeout,
                "patience": self.teacher_patience,
                "concurrency": self.teacher_concurrency,
            },
        }

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The autocast type, None for full precision."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    def to_dict(self) -> dict[str, Any]:
        """As TrainingArguments does, for trackers and JSON."""
        return {**super().to_dict(), "rollout": asdict(self.rollout)}

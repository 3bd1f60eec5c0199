"""Option names that other libraries use, and one line for a name that is not ours."""

from __future__ import annotations

import difflib
from collections.abc import Collection

# Names from TRL and its GKD and distillation trainers -> ours. A name that meant two things has two homes.
RENAMED = {
    "alpha": "objective.alpha",
    "beta": "objective.beta",
    "dataset": "dataset_name",
    "eval_packing": "packing (evaluation rows are never packed)",
    "lmbda": "on_policy_fraction",
    "loss_top_k": "signal_top_k",
    "max_new_tokens": "max_completion_length",
    "min_p": "rollout.top_p (min_p is not supported)",
    "max_seq_length": "max_length",
    "model_init_kwargs": "dtype, attn_implementation, model_revision and trust_remote_code",
    "model_name_or_path": "model",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "student": "model",
    "seq_kd": "rollout_source teacher, with on_policy_fraction 1",
    "teacher_model": "teacher",
    "teacher_model_init_kwargs": "teacher_dtype, teacher_attn_implementation and teacher_device_map",
    "teacher_model_name_or_path": "teacher",
    "teacher_model_revision": "teacher_revision",
    "teacher_model_server_url": "teacher, which takes a URL",
    "temperature": "objective.temperature for the loss, rollout.temperature for sampling",
    "top_k": "rollout.top_k for sampling, signal_top_k for the teacher",
    "top_p": "rollout.top_p",
    "torch_dtype": "dtype",
    "use_lora": "use_peft",
    "use_vllm": "rollout.engine vllm or server",
    "vllm_enable_sleep_mode": "rollout.sleep",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "vllm_max_model_length": "rollout.max_model_len",
    "vllm_mode": "rollout.engine: vllm (colocated) or server",
    "vllm_server_base_url": "rollout.url",
    "vllm_server_timeout": "rollout.timeout",
}
# Options of TrainingArguments and TRL that kdlib does without, and why.
LEFT_OUT = {
    "assistant_only_loss": "every assistant turn is scored, and nothing else",
    "average_tokens_across_devices": "the loss is always a mean over the scored tokens of all devices",
    "batch_eval_metrics": "evaluation always sums over all rows",
    "completion_only_loss": "the completion is scored, the prompt never",
    "dataset_text_field": "name the column `text`",
    "do_eval": "eval_strategy steps or epoch does",
    "do_predict": "kdlib evaluate scores a model",
    "do_train": "kdlib distill trains",
    "eval_accumulation_steps": "evaluation keeps no logits",
    "eval_do_concat_batches": "evaluation keeps no logits",
    "eval_use_gather_object": "evaluation keeps no logits",
    "hub_token": "log in with `hf auth login`, or set HF_TOKEN: options are written to config.yaml",
    "include_for_metrics": "evaluation keeps no logits",
    "label_names": "the collator names them",
    "label_smoothing_factor": "it has no effect on distillation losses",
    "length_column_name": "rows are prepared by kdlib",
    "liger_kernel_config": "kdlib has its own chunked kernel",
    "local_rank": "the launcher sets LOCAL_RANK",
    "padding_free": "packing true does it",
    "parallelism_config": "use --accelerate_config with a YAML file",
    "prediction_loss_only": "evaluation keeps no logits",
    "remove_unused_columns": "rows are prepared by kdlib",
    "resume_from_checkpoint": "the same command in the same output_dir resumes",
    "torch_compile": "the loss runs inside the wrapper's forward, where it does not compile",
    "torch_compile_backend": "torch_compile is not supported",
    "torch_compile_mode": "torch_compile is not supported",
    "use_liger_kernel": "kdlib has its own chunked kernel",
}


def unknown(key: str, known: Collection[str], *, of: str = "") -> str:
    """One line for an unknown option (``of`` a class): our name, why there is none, or the nearest."""
    if not of and key in RENAMED:
        return f"unknown option {key}: in kdlib it is {RENAMED[key]}"
    if not of and key in LEFT_OUT:
        return f"option {key} is not used here: {LEFT_OUT[key]}; leave it out"
    where = f" of {of}" if of else ""
    near = difflib.get_close_matches(key, known, n=1)
    if near:
        return f"unknown option {key}{where}: did you mean {near[0]}?"
    return f"unknown option {key}{where}: " + (f"it has {', '.join(known)}" if of else "--help_all lists all")

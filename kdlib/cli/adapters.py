"""From the adapter options to what peft and bitsandbytes take."""

from __future__ import annotations

from peft import LoraConfig, PeftConfig
from transformers import BitsAndBytesConfig

from kdlib.cli.arguments import AdapterArguments
from kdlib.teachers.hf import quantization


def peft_config(adapter: AdapterArguments) -> PeftConfig | None:
    """The LoRA configuration, None when all weights are trained."""
    if not adapter.use_peft:
        return None
    targets = adapter.lora_target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=adapter.lora_r,
        lora_alpha=adapter.lora_alpha,
        lora_dropout=adapter.lora_dropout,
        target_modules="all-linear" if targets is None or targets == ["all-linear"] else targets,
        modules_to_save=adapter.lora_modules_to_save,
        use_rslora=adapter.use_rslora,
    )


def quantization_config(adapter: AdapterArguments) -> BitsAndBytesConfig | None:
    """The bitsandbytes configuration of the student, None when it is not quantised."""
    return quantization(load_in_8bit=adapter.load_in_8bit, load_in_4bit=adapter.load_in_4bit)

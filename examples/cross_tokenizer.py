"""A new byte-level student of a teacher with BPE tokens, and the same student fine-tuned: python examples/cross_tokenizer.py

Trains both on the same rows of GSM8K and prints bits per byte, which compare across tokenizers. Needs runs/gsm8k/*.jsonl
(python examples/gsm8k_rows.py ../shared/data/gsm8k runs/gsm8k).
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from kdlib import ALM, CrossEntropy, CrossTokenizerTrainer, DistillationConfig, DistillationTrainer
from kdlib.eval import bits_per_byte
from kdlib.tokenizers import byte_tokenizer

TEACHER = "../shared/models/gsm8k-lm"
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 344,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def new_student(tokenizer: PreTrainedTokenizerBase) -> Any:
    set_seed(0)
    config = AutoConfig.from_pretrained(TEACHER, **SMALL, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", default="runs/gsm8k")
    parser.add_argument("--questions", type=int, default=100, help="test questions whose answers are scored")
    given = parser.parse_args()
    like = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer = byte_tokenizer(like)
    tokenizer.chat_template = like.chat_template
    train, test = (load_dataset("json", data_files=f"{given.rows}/{part}.jsonl", split="train") for part in ("train", "test"))
    for name, trainer_class, teacher, objective in (
        ("fine-tuning", DistillationTrainer, None, CrossEntropy()),
        ("ALM", CrossTokenizerTrainer, TEACHER, ALM()),
    ):
        args = DistillationConfig(
            output_dir=f"runs/bytes-{name}",
            max_length=1024,
            per_device_train_batch_size=8,
            max_steps=given.steps,
            learning_rate=3e-3,
            warmup_steps=0.05,
        )
        student = new_student(tokenizer)
        options = {"objective": objective, "args": args, "train_dataset": train, "processing_class": tokenizer}
        trainer_class(student, teacher, **options).train()
        scored = bits_per_byte(student.eval(), test.select(range(given.questions)), tokenizer=tokenizer, max_length=1024)
        print(f"{name}: {scored.bits_per_byte:.4f} bits per byte")


if __name__ == "__main__":
    main()

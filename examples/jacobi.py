"""From a model to one that decodes several tokens per forward pass, measured before and after: `kdlib jacobi` in Python.

python examples/gsm8k_rows.py ../shared/data/gsm8k runs/gsm8k
python examples/jacobi.py ../shared/models/gsm8k-lm runs/gsm8k
"""

from __future__ import annotations

import argparse
from typing import Any

from kdlib.data import load_rows
from kdlib.decoding import jacobi_generate
from kdlib.eval import bits_per_byte, jacobi
from kdlib.models import load_model, load_tokenizer
from kdlib.trainers import JacobiConfig, JacobiTrainer

BLOCK_SIZE = 16


def own_answers(model: Any, tokenizer: Any, rows: Any, *, max_new_tokens: int) -> list[dict[str, list[int]]]:
    """Greedy answers of the model to the rows' questions, as token rows to train on."""
    made = []
    for some in rows.iter(16):
        prompts = [messages[:-1] for messages in some["messages"]]
        layout = {"padding": True, "return_tensors": "pt", "return_dict": True, "tokenizer_kwargs": {"padding_side": "left"}}
        asked = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, **layout)
        output = jacobi_generate(model, **asked, max_new_tokens=max_new_tokens, block_size=BLOCK_SIZE)
        width = asked["input_ids"].shape[1]
        for ids, mask, length in zip(output.sequences, asked["attention_mask"], output.lengths, strict=True):
            prompt, answer = ids[:width][mask.bool()].tolist(), ids[width : width + length].tolist()
            made.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", help="directory with train.jsonl and test.jsonl, rows of messages")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--max_new_tokens", type=int, default=96)
    parser.add_argument("--output_dir", default="runs/jacobi-example")
    a = parser.parse_args()
    model, tokenizer = load_model(a.model), load_tokenizer(a.model)
    test = load_rows(f"{a.data}/test.jsonl").select(range(16))

    def measured(name: str) -> None:
        options = {"block_size": BLOCK_SIZE, "max_new_tokens": a.max_new_tokens, "timing": False}
        found = jacobi(model, test, tokenizer=tokenizer, **options)
        text = bits_per_byte(model, test, tokenizer=tokenizer)
        print(
            name, "tokens per forward", found.tokens_per_forward, "lossless", found.passed, text.bits_per_byte, "bits per byte"
        )

    measured("before")
    questions = load_rows(f"{a.data}/train.jsonl").select(range(a.rows))
    rows = own_answers(model, tokenizer, questions, max_new_tokens=a.max_new_tokens)
    args = JacobiConfig(
        output_dir=a.output_dir,
        block_size=BLOCK_SIZE,
        state_source="student",  # states are iterated by the model as it is; kdlib trajectories jacobi stores them instead
        max_steps=a.steps,
        learning_rate=5e-4,
        warmup_steps=0.05,
        save_strategy="no",
    )
    trainer = JacobiTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_final(f"{a.output_dir}/final")
    measured("after")


if __name__ == "__main__":
    main()

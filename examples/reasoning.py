"""Compress a model in Python: the same as `kdlib distill --config examples/reasoning.yaml`, with the objective of your choice.

python examples/gsm8k_rows.py ../shared/data/gsm8k runs/gsm8k
python examples/reasoning.py
"""

from __future__ import annotations

from kdlib import CrossEntropy, DistillationConfig, DistillationTrainer, ForwardKL, Sum

TEACHER = "../shared/models/gsm8k-lm"


def main() -> None:
    args = DistillationConfig(
        output_dir="runs/gsm8k-mixed",
        from_scratch=True,
        config_overrides={
            "hidden_size": 128,
            "intermediate_size": 344,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
        max_length=384,
        per_device_train_batch_size=32,
        max_steps=200,
        learning_rate=4e-3,
        warmup_steps=0.05,
    )
    trainer = DistillationTrainer(
        model=TEACHER,
        teacher=TEACHER,
        objective=Sum(parts=((0.9, ForwardKL()), (0.1, CrossEntropy()))),
        args=args,
        train_dataset="runs/gsm8k/train.jsonl",
        eval_dataset="runs/gsm8k/test.jsonl",
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_final("runs/gsm8k-mixed/final")


if __name__ == "__main__":
    main()

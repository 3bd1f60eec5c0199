"""Train a draft, measure what its target accepts of it, export it for vLLM: `kdlib draft` and its neighbours in Python.

python examples/gsm8k_rows.py ../shared/data/gsm8k runs/gsm8k
python examples/draft.py
"""

from __future__ import annotations

from kdlib import DistillationConfig, DraftTrainer, LKHybrid
from kdlib.data import load_rows
from kdlib.drafts import export_draft, pruned
from kdlib.eval import acceptance
from kdlib.models import load_model, load_tokenizer

TARGET = "../shared/models/gsm8k-lm"


def main() -> None:
    tokenizer = load_tokenizer(TARGET)
    draft = pruned(load_model(TARGET), [0, 3])
    prompts = load_rows("runs/gsm8k/test.jsonl").select(range(32))
    before = acceptance(TARGET, draft, prompts, tokenizer=tokenizer, gamma=4, timing=False)
    args = DistillationConfig(
        output_dir="runs/gsm8k-pruned",
        max_length=384,
        per_device_train_batch_size=16,
        max_steps=100,
        learning_rate=1e-3,
        warmup_steps=0.05,
    )
    trainer = DraftTrainer(
        draft, TARGET, objective=LKHybrid(), args=args, train_dataset="runs/gsm8k/train.jsonl", processing_class=tokenizer
    )
    trainer.train()
    trainer.save_final("runs/gsm8k-pruned/final")
    after = acceptance(TARGET, "runs/gsm8k-pruned/final", prompts, tokenizer=tokenizer, gamma=4)
    for name, found in (("pruned", before), ("trained", after)):
        print(name, "acceptance length", found.empirical[0].acceptance_length)
    made = export_draft("runs/gsm8k-pruned/final", "runs/gsm8k-pruned/vllm", target=TARGET, num_speculative_tokens=4)
    print(made.serve)


if __name__ == "__main__":
    main()

"""From an auto-regressive model to a diffusion model, and on to one of fewer decoding steps: `kdlib diffusion` in Python.

kdlib demo --output_dir demo
python examples/dllm.py demo/teacher/final demo/teacher_train.jsonl demo/test.jsonl
"""

from __future__ import annotations

import argparse
from typing import Any

from kdlib.data import load_rows
from kdlib.data.diffusion import trajectory_row
from kdlib.decoding import DiffusionDecoder
from kdlib.decoding.strategies import ConfidenceThreshold, LowConfidence, Strategy
from kdlib.diffusion import spec_of
from kdlib.models import load_tokenizer
from kdlib.objectives import CertaintyForcing, MaskedELBO
from kdlib.trainers import DiffusionConfig, DiffusionDistillationTrainer, DiffusionTrainer
from kdlib.verifiers import ExactNumber

LENGTH = 32  # tokens of a response with its padding, in one block


def answers(model: Any, tokenizer: Any, rows: Any, strategy: Strategy) -> tuple[list[dict[str, Any]], float, float]:
    """Trajectories of the right answers (of all where none is right), the share of right ones, tokens per forward."""
    turns = [[row["messages"][0]] for row in rows]
    prompts = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    decoder = DiffusionDecoder(gen_length=LENGTH, block_length=LENGTH, strategy=strategy)
    made, verifier, tokens, forwards = [], ExactNumber(), 0, 0
    model.eval()
    for numbers, output in decoder.decode(model, prompts, spec=spec_of(model.config), batch_size=64):
        for i, number in enumerate(numbers):
            length, passes = int(output.lengths[i]), int(output.forwards[i])
            text = output.sequences[i, -LENGTH:].tolist()[: length + 1]  # with its end token
            steps = output.commit_step[i].tolist()[: length + 1]
            row = trajectory_row(prompts[number], text, commit_step=steps, block_length=LENGTH, forwards=passes)
            made.append((row, verifier(tokenizer.decode(text[:length]), rows[number])))
            tokens, forwards = tokens + length, forwards + passes
    right = [row for row, correct in made if correct]
    return right or [row for row, _ in made], len(right) / len(made), tokens / forwards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="auto-regressive")
    parser.add_argument("train", help="rows of messages, with an answer that is a number")
    parser.add_argument("test")
    parser.add_argument("--rows", type=int, default=512, help="questions that are answered, of each file")
    parser.add_argument("--steps", type=int, nargs=2, default=[600, 150], help="of adaptation and of distillation")
    parser.add_argument("--output_dir", default="runs/dllm-example")
    a = parser.parse_args()
    tokenizer, train, test = load_tokenizer(a.model), load_rows(a.train), load_rows(a.test, limit=a.rows)
    common: dict[str, Any] = {"block_length": LENGTH, "response_length": LENGTH, "max_length": 128, "save_strategy": "no"}
    common |= {"per_device_train_batch_size": 32, "warmup_steps": 0.05}

    adapt = {"mask_token": "<|mask|>", "shift": True, "max_steps": a.steps[0], "learning_rate": 2e-3}
    args = DiffusionConfig(output_dir=f"{a.output_dir}/teacher", **adapt, **common)
    objective = MaskedELBO(weighting="uniform")  # less noise than the bound's 1 / p, which short runs do not average out
    teacher = DiffusionTrainer(a.model, objective=objective, args=args, train_dataset=train, processing_class=tokenizer)
    teacher.train()
    teacher.save_final(f"{a.output_dir}/teacher/final")

    rows, *_ = answers(teacher.model, tokenizer, train.select(range(a.rows)), LowConfidence(steps=LENGTH))
    args = DiffusionConfig(output_dir=f"{a.output_dir}/student", max_steps=a.steps[1], learning_rate=1e-3, **common)
    student = DiffusionDistillationTrainer(
        f"{a.output_dir}/teacher/final", objective=CertaintyForcing(weight=1.0), args=args, train_dataset=rows
    )
    student.train()
    student.save_final(f"{a.output_dir}/student/final")

    for name, strategy in (("one token a pass", LowConfidence(steps=LENGTH)), ("threshold 0.9", ConfidenceThreshold())):
        for who, trainer in (("teacher", teacher), ("student", student)):
            _, accuracy, speed = answers(trainer.model, tokenizer, test, strategy)
            print(f"{who}, {name}: accuracy {accuracy:.3f}, {speed:.2f} tokens per forward")


if __name__ == "__main__":
    main()

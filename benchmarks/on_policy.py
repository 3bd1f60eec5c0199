"""One on-policy step end to end, and its rollouts alone, beside TRL's DistillationTrainer.

    python benchmarks/on_policy.py [--quick] [--vllm] [--output docs/results/on_policy.md]

Both trainers get the same student, teacher, prompts, batch, completion length, temperature and objective (reverse KL, TRL's
beta 1). Every method has a process of its own; rounds alternate and ratios are taken within a round, so that a machine with
other work slows both sides. Models are random and draw the end-of-turn token about once in V tokens: nearly every completion
runs to the limit, so that both sides draw equally many tokens. --vllm adds both colocated vLLM engines; TRL's push of weights
into vLLM fails on CPU, so that there it draws with the first weights, and only its rollouts are measured. It leaves the
engine's dtype to vLLM, which serves a float32 checkpoint in bfloat16; ours computes as training does unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from kdlib.cli.env import machine_line
from kdlib.files import write_whole

AHEAD = "kdlib, hf engine, max_staleness 1"
TRL_VLLM = "TRL 1.16, vllm engine (bfloat16)"
VLLM_METHODS = ("kdlib, vllm engine (float32)", "kdlib, vllm engine (bfloat16)", TRL_VLLM)
METHODS = ("kdlib, hf engine", AHEAD, "TRL 1.16")
SIZES = {
    "full": {
        "vocab": 8192,
        "student": (256, 4),
        "teacher": (512, 6),
        "prompts": 16,
        "prompt": 48,
        "completion": 64,
        "steps": 6,
    },
    "quick": {"vocab": 512, "student": (32, 2), "teacher": (32, 2), "prompts": 4, "prompt": 8, "completion": 8, "steps": 2},
}
SKIPPED = 1  # the first step of a run allocates


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Words w0, w1, ... are tokens: a prompt has as many tokens as words, for both trainers."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(vocab - 3)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def write_models(root: Path, sizes: dict[str, Any]) -> None:
    tokenizer = word_tokenizer(sizes["vocab"])
    for name, seed in (("student", 0), ("teacher", 1)):
        hidden, layers = sizes[name]
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=sizes["vocab"],
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32 or 1,
            num_key_value_heads=hidden // 32 or 1,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )
        model = LlamaForCausalLM(config)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, sizes["vocab"] - 3, (sizes["prompts"] * 8, sizes["prompt"]), generator=generator).tolist()
    prompts = [{"prompt": " ".join(f"w{i}" for i in line)} for line in drawn]
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


class Clock(TrainerCallback):
    """Wall seconds of each optimizer step, rollouts and data included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def options(output: Path, sizes: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "per_device_train_batch_size": sizes["prompts"],
        "max_steps": sizes["steps"] + SKIPPED,
        "logging_steps": 1000,
        "learning_rate": 1e-5,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "max_completion_length": sizes["completion"],
    }


def measure(method: str, root: Path, sizes: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step and of its rollout, in this process."""
    clock, drawing = Clock(), []
    with tempfile.TemporaryDirectory() as output:
        if method.startswith("TRL"):
            trainer = _trl(method, root, Path(output), sizes, clock)
            owner, name = trainer, "_generate_single_turn"
        else:
            trainer = _kdlib(method, root, Path(output), sizes, clock)
            owner, name = trainer.on_policy.engine.sampler, "generate"
        original = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            made = original(*arguments, **keywords)
            drawing.append(time.perf_counter() - start)
            return made

        setattr(owner, name, timed)
        trainer.train()
    return {"step": median(clock.seconds[SKIPPED:]), "rollout": median(drawing[SKIPPED:])}


def _kdlib(method: str, root: Path, output: Path, sizes: dict[str, Any], clock: Clock) -> Any:
    from kdlib.objectives import ReverseKL
    from kdlib.samplers import RolloutConfig
    from kdlib.trainers import DistillationConfig, DistillationTrainer

    dtype = "bfloat16" if "bfloat16" in method else None
    rollout = RolloutConfig(engine="vllm", max_model_len=256, dtype=dtype) if "vllm" in method else RolloutConfig()
    return DistillationTrainer(
        model=str(root / "student"),
        teacher=str(root / "teacher"),
        objective=ReverseKL(),
        args=DistillationConfig(
            **options(output, sizes),
            on_policy_fraction=1.0,
            max_length=256,
            rollout=rollout,
            max_staleness=int(method == AHEAD),
        ),
        train_dataset=str(root / "prompts.jsonl"),
        callbacks=[clock],
    )


def _trl(method: str, root: Path, output: Path, sizes: dict[str, Any], clock: Clock) -> Any:
    from datasets import load_dataset
    from trl import DistillationConfig, DistillationTrainer

    vllm = "vllm" in method
    engine = {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 256} if vllm else {}
    if vllm:  # its external launcher reads torchrun's variables
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _port()}
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    trainer = DistillationTrainer(
        model=str(root / "student"),
        teacher_model=str(root / "teacher"),
        args=DistillationConfig(**options(output, sizes), beta=1.0, temperature=1.0, **engine),
        train_dataset=load_dataset("json", data_files=str(root / "prompts.jsonl"), split="train"),
        callbacks=[clock],
    )
    if vllm and not torch.cuda.is_available():
        trainer.vllm_generation.sync_weights = lambda: None
    return trainer


def _port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def in_process(method: str, root: Path, *, quick: bool) -> dict[str, float]:
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--measure",
        method,
        "--root",
        str(root),
        *(["--quick"] if quick else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rounds: list[dict[str, dict[str, float]]], tokens: int) -> list[list[str]]:
    """A line for each method; ratios to TRL with the same kind of engine, within a round."""
    lines = []
    for method in rounds[0]:
        peer = TRL_VLLM if "vllm" in method else "TRL 1.16"
        ratio = {part: median(r[method][part] / r[peer][part] for r in rounds) for part in ("step", "rollout")}
        seconds = {part: median(r[method][part] for r in rounds) for part in ("step", "rollout")}
        whole = "vllm" not in method or torch.cuda.is_available()  # without weights to push a step is not one
        lines.append(
            [
                method,
                f"{seconds['step']:.2f}" if whole or "kdlib" in method else "",
                f"{ratio['step']:.2f}" if whole else "",
                f"{seconds['rollout']:.2f}",
                f"{tokens / seconds['rollout']:,.0f}",
                f"{1 / ratio['rollout']:.2f}",
            ]
        )
    return lines


HEAD = ["method", "step (s)", "step / TRL's", "rollout (s)", "rollout tokens/s", "rollout rate / TRL's"]


def report(lines: list[list[str]], sizes: dict[str, Any]) -> str:
    shape = (
        f"Student Llama {sizes['student'][0]} wide, {sizes['student'][1]} layers; teacher {sizes['teacher'][0]} wide, "
        f"{sizes['teacher'][1]} layers; V = {sizes['vocab']}; {sizes['prompts']} prompts of {sizes['prompt']} tokens, "
        f"{sizes['completion']} new tokens each; float32, reverse KL, seed 0."
    )
    return "\n".join(
        [
            "# One on-policy step beside TRL",
            "",
            f"Command: `OMP_NUM_THREADS=1 python benchmarks/on_policy.py {' '.join(sys.argv[1:])}`",
            "",
            shape,
            "A step is rollout, teacher and update; ratios are medians over rounds of all methods in turn, those of vLLM",
            "engines to TRL with vLLM.",
            "",
            "| " + " | ".join(HEAD) + " |",
            "|---|" + "---:|" * (len(HEAD) - 1),
            *("| " + " | ".join(line) + " |" for line in lines),
            "",
            machine_line(),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument("--vllm", action="store_true", help="also our colocated vLLM engine")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", help="write the table as Markdown to this file")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = SIZES["quick" if arguments.quick else "full"]
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, Path(arguments.root), sizes)))
        return
    methods = [*METHODS, *(VLLM_METHODS if arguments.vllm else [])]
    with tempfile.TemporaryDirectory() as directory:
        write_models(Path(directory), sizes)
        count = 1 if arguments.quick else arguments.rounds
        rounds = [{m: in_process(m, Path(directory), quick=arguments.quick) for m in methods} for _ in range(count)]
    lines = table(rounds, sizes["prompts"] * sizes["completion"])
    shown = Table(*HEAD)
    for line in lines:
        shown.add_row(*line)
    Console().print(shown)
    if arguments.output:
        write_whole(arguments.output, report(lines, sizes))


if __name__ == "__main__":
    main()

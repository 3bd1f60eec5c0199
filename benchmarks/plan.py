"""What kdlib plan predicts beside what runs really take: peak memory of the process, and time.

    python benchmarks/plan.py [--only NAME ...] [--steps 20] [--quick] [--output docs/results/plan.md]

Runs on CPU, each in a process of its own, as users type them: the plan first (it loads no weights), then the run, whose peak
is what the kernel says of the process when it has ended (ru_maxrss: all pages that were in memory at once, libraries included).
Time is predicted by --measure from three steps of a run of its own. Models are random: nothing but shapes matters. Rows have
the lengths that are named. --quick: two runs with tiny models and no times, to see that the script works.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from on_policy import word_tokenizer
from page import markdown_table, write_results
from rich.console import Console
from training import typed
from transformers import LlamaConfig, LlamaForCausalLM

from kdlib.cli.planning.text import size

VOCAB = 8192
SHAPES = {"wide": (640, 8), "narrow": (320, 6), "tiny": (32, 2)}
AIM_MEMORY, AIM_TIME = 0.15, 0.30


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run: its command, the student's shape, rows of a length range, and its options."""

    command: str = "distill"
    student: str = "wide"
    teacher: str | None = "wide"
    lengths: tuple[int, int] = (96, 128)
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "full": Case(options={"per_device_train_batch_size": 4}),
    "LoRA": Case(options={"per_device_train_batch_size": 8, "use_peft": True, "lora_dropout": 0.05}),
    "long rows": Case(
        student="narrow", teacher="narrow", lengths=(900, 1024), options={"per_device_train_batch_size": 2, "max_length": 1024}
    ),
    "long rows, checkpointing": Case(
        student="narrow",
        teacher="narrow",
        lengths=(900, 1024),
        options={"per_device_train_batch_size": 2, "max_length": 1024, "gradient_checkpointing": True},
    ),
    "cached teacher": Case(teacher="cache", options={"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    "on-policy": Case(
        lengths=(24, 32),
        options={
            "per_device_train_batch_size": 8,
            "on_policy_fraction": 1.0,
            "max_completion_length": 64,
            "objective": "ReverseKL",
        },
    ),
    "dLLM": Case(
        command="diffusion",
        teacher=None,
        options={
            "per_device_train_batch_size": 8,
            "mask_token": "<mask>",
            "shift": True,
            "max_length": 128,
            "evaluate.limit": 0,
        },
    ),
}
QUICK = ("full", "dLLM")


def write_models(root: Path) -> None:
    """A model of every shape, with one tokenizer, as safetensors in float32."""
    tokenizer = word_tokenizer(VOCAB - 8)  # which leaves room for a mask token
    for name, (hidden, layers) in SHAPES.items():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 32,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
        LlamaForCausalLM(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def write_rows(path: Path, lengths: tuple[int, int], *, count: int, prompts: bool) -> None:
    """Rows of random words, of lengths that are spread evenly over the range."""
    generator = torch.Generator().manual_seed(0)
    with path.open("w", encoding="utf-8") as file:
        for row in range(count):
            length = lengths[0] + (lengths[1] - lengths[0]) * (row % 17) // 16
            words = " ".join(f"w{i}" for i in torch.randint(VOCAB - 16, (length,), generator=generator).tolist())
            file.write(json.dumps({"prompt" if prompts else "text": words}) + "\n")


def timed(call: list[str], *, log: Path) -> tuple[int, float]:
    """(most bytes that the process held, seconds) of a command that works."""
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(call, stdout=file, stderr=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(call)}\n{log.read_text()[-3000:]}")
    return usage.ru_maxrss * 1024, time.perf_counter() - start


def compared(case: Case, root: Path, *, steps: int, measure: bool, quick: bool) -> dict[str, Any]:
    """The plan of a case, and what its run took."""
    at = Path(tempfile.mkdtemp(dir=root))
    rows, shape = at / "rows.jsonl", "tiny" if quick else case.student
    write_rows(rows, case.lengths, count=16 if quick else 256, prompts="on_policy_fraction" in case.options)
    options: dict[str, Any] = {"model": root / shape, "dataset_name": rows, "max_steps": steps, "use_cpu": True, **case.options}
    options |= {"output_dir": at / "run", "save_strategy": "no", "learning_rate": 1e-5}
    kdlib = [sys.executable, "-m", "kdlib"]
    if case.teacher is not None:
        options["teacher"] = root / ("tiny" if quick else case.teacher)
    if case.teacher == "cache":
        options["teacher"] = at / "cache"
        cache = {"teacher": root / shape, "dataset_name": rows, "output_dir": at / "cache", "batch_size": 4}
        timed([*kdlib, "cache", *typed(cache)], log=at / "cache.log")
    plan = [*kdlib, "plan", case.command, *typed(options), "--output_path", str(at / "plan.json")]
    timed([*plan, *(["--measure"] if measure else [])], log=at / "plan.log")
    memory, seconds = timed([*kdlib, case.command, *typed(options)], log=at / "run.log")
    return {"plan": json.loads((at / "plan.json").read_text()), "memory": memory, "seconds": seconds}


def row(name: str, found: dict[str, Any]) -> list[str]:
    memory = found["plan"]["memory"]
    shown = [name, memory["phase"], size(memory["needed"]), size(found["memory"]), f"{memory['needed'] / found['memory']:.2f}"]
    time_ = found["plan"].get("time")
    if time_ is None:
        return [*shown, "", "", ""]
    return [*shown, f"{time_['seconds']:.0f} s", f"{found['seconds']:.0f} s", f"{time_['seconds'] / found['seconds']:.2f}"]


HEAD = ["run", "fullest in", "memory, planned", "measured", "ratio", "time, planned", "measured", "ratio"]


def parts_table(found: dict[str, dict[str, Any]]) -> str:
    """What the planned memory is made of, in the fullest phase."""
    chosen = {name: one["plan"]["memory"]["phases"][one["plan"]["memory"]["phase"]] for name, one in found.items()}
    parts = list(dict.fromkeys(part for phase in chosen.values() for part in phase))
    rows = [[part, *(size(phase[part]) if part in phase else "" for phase in chosen.values())] for part in parts]
    return markdown_table(["part", *chosen], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--memory_only", action="store_true", help="no times: --steps 3 is enough then")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output")
    given = parser.parse_args()
    names, found = (QUICK if given.quick else given.only), {}
    with tempfile.TemporaryDirectory(prefix="kdlib-plan-") as folder:
        root = Path(folder)
        write_models(root)
        for name in names:
            steps = 2 if given.quick else given.steps
            measure = not given.quick and not given.memory_only
            found[name] = compared(CASES[name], root, steps=steps, measure=measure, quick=given.quick)
            Console(soft_wrap=True, highlight=False).print(" | ".join(row(name, found[name])), markup=False)
    table = markdown_table(HEAD, [row(name, one) for name, one in found.items()])
    aims = f"Aims: memory within {AIM_MEMORY:.0%} of what is measured, time within {AIM_TIME:.0%}."
    parts = [(__doc__ or "").strip().split("\n\n")[-1], table, aims, "What the planned memory is made of:", parts_table(found)]
    Console(soft_wrap=True, highlight=False).print("\n\n".join(parts), markup=False)
    if given.output:
        write_results(given.output, title="Plans beside runs", parts=parts)


if __name__ == "__main__":
    main()

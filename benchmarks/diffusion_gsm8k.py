"""A diffusion model made of a real 4.2M-parameter language model, and its certainty-forced student: GSM8K text.

python benchmarks/diffusion_gsm8k.py --seeds 0 1 2 --output docs/results/diffusion_gsm8k.md
--quick trains for a few steps, to see that the script works.

The model is too small to solve problems, so what counts is how well it predicts text: bits per byte of the test answers (for
diffusion models a bound, by Monte-Carlo masks), and the tokens that a forward pass gives. For every seed the causal model
becomes a diffusion model (MaskedELBO), answers training questions one token in each pass, and students learn from that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from diffusion_runs import MASK, write_trajectories
from page import markdown_table, write_results
from rich.console import Console
from rich.table import Table
from training import trained

from kdlib.data import load_rows
from kdlib.eval import bits_per_byte, diffusion
from kdlib.files import write_whole
from kdlib.models import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA, MODEL = ROOT / "../shared/data/gsm8k", ROOT / "../shared/models/gsm8k-lm"
RESPONSE, BLOCK, LONGEST, MC_SAMPLES = 128, 32, 320, 8
COMMON: dict[str, Any] = {
    "response_length": RESPONSE,
    "block_length": BLOCK,
    "max_length": LONGEST,
    "per_device_train_batch_size": 8,
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "save_strategy": "no",
    "evaluate.limit": 0,
}
ADAPTATION = {"mask_token": MASK, "shift": True, "learning_rate": 1e-3, **COMMON}
TEACHER = "diffusion model (MaskedELBO)"
METHODS: dict[str, dict[str, Any]] = {"certainty forcing": {"objective": "CertaintyForcing"}}
STRATEGIES = [{"LowConfidence": {"steps": RESPONSE}}, {"ConfidenceThreshold": {"threshold": [0.9, 0.7, 0.5]}}]
Found = dict[str, Any]


def measured(model: Path, rows: Any, arguments: argparse.Namespace) -> Found:
    """The bound in bits per byte, and tokens per forward for every strategy; kept beside the model."""
    path = model.parent / f"measured-{arguments.prompts}-{arguments.text_rows}.json"
    if not path.is_file():
        prompts = rows.select(range(arguments.prompts))
        sweep = diffusion(
            str(model),
            prompts=prompts,
            rows=rows.select(range(arguments.text_rows)),
            strategies=STRATEGIES,
            gen_length=RESPONSE,
            block_length=BLOCK,
            batch_size=16,
            mc_samples=MC_SAMPLES,
            max_length=LONGEST,
        )
        write_whole(path, json.dumps(sweep.to_json()))
    found: Found = json.loads(path.read_text())
    return found


def one_seed(root: Path, arguments: argparse.Namespace, *, seed: int, rows: Path) -> dict[str, Found]:
    """{model: what was measured}, the diffusion model first."""
    given = {"model": MODEL, "dataset_name": rows / "train.jsonl", "seed": seed, "max_steps": arguments.adaptation_steps}
    teacher = trained("diffusion", root / "teacher", **given, **ADAPTATION)
    answers = root / f"trajectories-{arguments.rows}"
    options = {"gen_length": RESPONSE, "block_length": BLOCK, "batch_size": 32, "keep": "all", "keep_unfinished": True}
    options |= {"attempts": 1, "cache": "dual"}
    write_trajectories(teacher, rows / "train.jsonl", answers, limit=arguments.rows, options=options)
    test = load_rows(str(rows / "test.jsonl"))
    found = {TEACHER: measured(teacher, test, arguments)}
    common = {"model": teacher, "dataset_name": answers, "seed": seed, "max_steps": arguments.steps, "learning_rate": 3e-4}
    for name, method in METHODS.items():
        output = root / "".join(c if c.isalnum() else "-" for c in name)
        found[name] = measured(trained("diffusion", output, **common, **COMMON, **method), test, arguments)
    return found


def causal_bits(arguments: argparse.Namespace, rows: Path) -> float:
    """Bits per byte of the causal model that all started from, exact."""
    test = load_rows(str(rows / "test.jsonl")).select(range(arguments.text_rows))
    tokenizer = load_tokenizer(str(MODEL))
    return bits_per_byte(load_model(str(MODEL)), test, tokenizer=tokenizer, batch_size=16, max_length=LONGEST).bits_per_byte


def table(found: Sequence[Mapping[str, Found]]) -> tuple[list[str], list[list[str]]]:
    """Means over seeds, with the standard deviation of the bound."""
    points = found[0][TEACHER]["points"]
    ways = [
        ", ".join(f"{name}({value})" for name, of in point["strategy"].items() for value in of.values()) for point in points
    ]
    lines = []
    for name in found[0]:
        bits = [of[name]["bits_per_byte_bound"]["model"]["bits_per_byte"] for of in found]
        spread = f" ± {stdev(bits):.3f}" if len(bits) > 1 else ""
        cells = [mean(of[name]["points"][i]["tokens_per_forward"]["value"] for of in found) for i in range(len(points))]
        lines.append([name, f"{mean(bits):.3f}{spread}", *(f"{cell:.2f}" for cell in cells)])
    return ["model", "bits per byte, at most", *(f"tokens per forward, {way}" for way in ways)], lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--adaptation_steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=96, help="training questions that the diffusion model answers")
    parser.add_argument("--prompts", type=int, default=16, help="test questions that are answered")
    parser.add_argument("--text_rows", type=int, default=50, help="test answers for bits per byte")
    parser.add_argument("--runs", default="runs/diffusion-gsm8k", help="where models are kept")
    parser.add_argument("--output", help="write the table as Markdown to this file")
    parser.add_argument("--quick", action="store_true", help="a few steps and rows")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.seeds, arguments.adaptation_steps, arguments.steps = arguments.seeds[:1], 2, 2
        arguments.rows, arguments.prompts, arguments.text_rows = 2, 1, 2
        del STRATEGIES[0]  # which takes as many passes as tokens
    runs = Path(arguments.runs).resolve()
    rows = runs / "rows"
    subprocess.run([sys.executable, "examples/gsm8k_rows.py", str(DATA), str(rows)], cwd=ROOT, check=True)
    found = [one_seed(runs / str(seed), arguments, seed=seed, rows=rows) for seed in arguments.seeds]
    exact = causal_bits(arguments, rows)
    head, lines = table(found)
    shown = Table(*head)
    for line in lines:
        shown.add_row(*line)
    Console(width=200).print(shown)
    print(f"the causal model: {exact:.3f} bits per byte")
    if arguments.output:
        write_results(arguments.output, title="Diffusion models on GSM8K text", parts=parts(arguments, head, lines, exact))


def parts(arguments: argparse.Namespace, head: list[str], lines: list[list[str]], exact: float) -> list[str]:
    return [
        f"Means over seeds {arguments.seeds}. Bits per byte of {arguments.text_rows} test answers: an upper bound, by "
        f"{MC_SAMPLES} masks for each; the causal model that all started from has {exact:.3f}, exactly. Tokens per forward: "
        f"before the end token, on {arguments.prompts} test questions, responses of {RESPONSE} tokens in blocks of {BLOCK}.",
        markdown_table(head, lines),
        f"The causal model became a diffusion model in {arguments.adaptation_steps} steps of 8 rows on the training answers "
        f"(options {ADAPTATION}); students learnt its own answers to {arguments.rows} training questions, all of them, in "
        f"{arguments.steps} steps (learning rate 3e-4, {METHODS}).",
    ]


if __name__ == "__main__":
    main()
